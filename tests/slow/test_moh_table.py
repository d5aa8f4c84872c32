"""The table of pocket-llama as a mixture of heads: its controls are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import train_moh as table

import interp
from interp.edits import HeadGate
from interp.nn import MixtureOfHeads

pytestmark = pytest.mark.usefixtures("one_thread")


def test_fixed_heads_are_as_many_as_a_router_keeps() -> None:
    model = interp.load("llama")
    ids = torch.arange(12)[None]
    on = []
    for edit in (table.fixed(model, 3), HeadGate(), MixtureOfHeads(model, straight=True).edit()):
        with torch.no_grad(), model.edit(edit), model.capture_z() as z:
            model.logits(ids)
        on.append(torch.stack([(z[layer] != 0).any(-1) for layer in range(4)]))
    assert all(bool((one.sum(-1) == 6).all()) for one in on)
    assert bool((on[0] == on[0][:, :, :1]).all())  # the same heads for all tokens
    assert bool(on[0][..., :4].all())
    draws = {str(table.fixed(model, seed)) for seed in range(8)}
    assert len(draws) > 4


def test_shuffled_routers_have_the_same_rows() -> None:
    model = interp.load("llama")
    edit = MixtureOfHeads(model, seed=2).edit()
    other = table.shuffled(edit, 0)
    assert not torch.equal(other.weights, edit.weights)
    for a, b in zip(edit.weights, other.weights, strict=True):
        assert torch.equal(a[:4], b[:4]) and torch.equal(a[-2:], b[-2:])
        assert sorted(a[4:-2].sum(1).tolist()) == sorted(b[4:-2].sum(1).tolist())


def test_differences_are_paired_and_resampled_over_seeds_and_rows() -> None:
    rng = np.random.default_rng(0)
    base = {seed: list(rng.normal(size=50) * 9) for seed in range(2)}
    values = {seed: [x + 0.5 for x in base[seed]] for seed in range(2)}
    found = table.row_of(values, base)["interval"]
    assert found["low"] == pytest.approx(0.5) and found["high"] == pytest.approx(0.5)
    alone = table.row_of(values, None)["interval"]
    assert alone["high"] - alone["low"] > 1


@pytest.mark.long
def test_every_way_is_tuned_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "HELD_OUT", table.ROWS)
    result = table.measure(2, 1)
    shown = table.render_table(result)
    assert all(f"| tuned, {way} |" in shown for way in table.WAYS)
    change = {way: result["rows"][f"tuned, {way}"]["interval"]["mean"] for way in table.WAYS}
    assert abs(change["no router"]) < 0.05 < change["fixed heads, drawn"]
