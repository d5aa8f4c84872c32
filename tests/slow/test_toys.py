"""What the toys' training shows, beside the controls that would refute it (notebook 05)."""

from __future__ import annotations

import pytest
import torch
from toys import backcopy, entropy_collapse, linear_regression, scan_and_snap, selective_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_heads_learn_a_step_of_descent() -> None:
    found = linear_regression.train()
    errors = linear_regression.errors(found)
    assert errors["two heads"] == pytest.approx(errors["one step of descent"], rel=0.1)
    assert errors["ridge regression"] < errors["two heads"] < 0.3 * errors["zero"]
    left = linear_regression.patterns(found)
    assert left.pop("signs_agree") == 1 and max(left.values()) < 0.06, left


def test_the_formula_of_the_regression_s_attention() -> None:
    """`predicted` token by token."""
    z, _ = linear_regression.prompts(3, torch.Generator().manual_seed(0))
    size = (2, linear_regression.DIM + 1, linear_regression.DIM + 1)
    kq, ov = (torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    for n in range(3):
        wanted = 0.0
        for h in range(2):
            keys = [z[n, :, i] for i in range(linear_regression.LENGTH)]
            scores = torch.stack([k @ kq[h] @ z[n, :, -1] for k in keys])
            mixed = sum(w * k for w, k in zip(scores.softmax(0), keys, strict=True))
            wanted += float((ov[h] @ mixed)[-1])
        assert float(linear_regression.predicted(z, kq, ov)[n]) == pytest.approx(wanted, abs=1e-4)


def test_attention_scans_by_frequency_and_snaps() -> None:
    found = {ratio: scan_and_snap.findings(scan_and_snap.train(ratio)) for ratio in (0.1, 1.0, 10)}
    for one in found.values():
        assert one["common_first"] == pytest.approx(0.5, abs=0.01)
        assert one["by_frequency"] == 1 and one["moved_in_second_half"] < 0.2
    last = [found[ratio]["common_last"] for ratio in (0.1, 1.0, 10)]
    assert last == sorted(last) and last[0] < 0.2 < last[1] < 0.35 < last[2] < 0.45
    control = scan_and_snap.findings(scan_and_snap.train(shuffled=True))
    assert control["common_last"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.long
def test_a_head_rests_on_the_first_token_where_it_has_nothing_to_do() -> None:
    found, control = (backcopy.at_last(backcopy.train(triggers=t)) for t in (True, False))
    assert found["copied"] > 0.95
    assert max(found["loss_trigger"], found["loss_plain"]) < 0.05
    assert found["sink_trigger"] < 0.02
    assert found["sink_plain"] > 2 * control["sink_plain"]
    assert found["drain"] < 0.5 < control["drain"]


@pytest.mark.long
def test_entropy_collapses_at_a_large_rate_and_not_under_sigma_reparam() -> None:
    usual = entropy_collapse.train(1e-3)
    assert usual.loss[-1] < 0.1 and usual.entropy[-1].mean() > 0.4
    plain, held = (entropy_collapse.train(0.1, sigma) for sigma in (False, True))
    assert plain.entropy[-1].max() < 0.05 and plain.loss[-1] > 0.5 and plain.norm[-1].max() > 20
    assert held.entropy[-1].mean() > 0.5 and held.loss[-1] < 0.05 and held.norm[-1].max() < 10


@pytest.mark.long
def test_token_temperatures_keep_attention_together_and_help_no_longer_row() -> None:
    for seed in (1, 2):
        made = [selective_attention.train(way, seed) for way in ("plain", "token")]
        plain, token = ([selective_attention.ask(m, half) for half in (16, 64)] for m in made)
        assert max(plain[0].loss, token[0].loss) < 0.15  # both copy rows of a trained length
        assert token[1].spread < plain[1].spread - 0.05
        assert min(plain[1].loss, token[1].loss) > 3  # and neither a row four times as long
