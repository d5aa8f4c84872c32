"""Inference-time intervention: probes against scipy's minimum of the same loss, directions by their
definition, and a checkpoint with the vectors baked in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from scipy.optimize import minimize

import interp
from interp.edits import ShiftHeads, fit_iti, iti_for
from interp.edits.fit_iti import probe_heads, shift_along
from interp.errors import EditError, InputError

THINGS = ("cat", "dog", "cup", "pen", "box", "boy", "girl", "ball")
GOOD = [f"the {x} saw the dog" for x in THINGS]
BAD = [f"the {x} gave a drink to" for x in THINGS]


@pytest.fixture(scope="module")
def model() -> Any:
    return interp.load("llama")


def test_probes_are_ridge_logistic_regressions() -> None:
    rng = np.random.default_rng(0)
    x, held = torch.tensor(rng.normal(size=(3, 30, 4))), torch.tensor(rng.normal(size=(3, 7, 4)))
    labels = torch.tensor((rng.random(30) < 0.5).astype(float))
    found = fit_iti._logistic(x, labels, held)
    for h in range(3):
        mean, scale = x[h].mean(0).numpy(), x[h].std(0).numpy()
        a, sign = (x[h].numpy() - mean) / scale, 2 * labels.numpy() - 1

        def loss(w: np.ndarray, a: np.ndarray = a, sign: np.ndarray = sign) -> float:
            return np.logaddexp(0, -sign * (a @ w[:-1] + w[-1])).sum() + w[:-1] @ w[:-1] / 2

        w = minimize(loss, np.zeros(5), tol=1e-12).x
        wanted = (held[h].numpy() - mean) / scale @ w[:-1] + w[-1]
        np.testing.assert_allclose(found[h], wanted, atol=1e-3)


def test_a_head_that_knows_is_found_and_one_that_does_not_is_at_chance() -> None:
    rng = np.random.default_rng(1)
    labels = torch.tensor([1.0] * 60 + [0.0] * 60, dtype=torch.float64)
    z = torch.tensor(rng.normal(size=(120, 2, 6)))
    z[:60, 1, 2] += 6.0
    accuracy, likelihood, direction, spread = fit_iti._probed(z, labels, 0)
    assert accuracy[1] > 0.97 and abs(float(accuracy[0]) - 0.5) < 0.15
    assert likelihood[1] > -0.2 > likelihood[0]
    gap = z[:60, 1].mean(0) - z[60:, 1].mean(0)
    torch.testing.assert_close(direction[1], gap / gap.norm())
    torch.testing.assert_close(spread[1], (z[:, 1] @ direction[1]).std())


def test_directions_are_of_the_last_token(model: Any) -> None:
    found = probe_heads(model, GOOD, BAD)
    rows = []
    for text in (*GOOD, *BAD):
        with model.capture_z() as z:
            model(text)
        rows.append(z[2][0, -1, 3].double())
    both = torch.stack(rows)
    gap = both[:8].mean(0) - both[8:].mean(0)
    place = found.heads.index(interp.Head(2, 3))
    torch.testing.assert_close(found.direction[place], gap / gap.norm(), atol=1e-4, rtol=1e-3)
    spread = (both @ (gap / gap.norm())).std()
    torch.testing.assert_close(found.spread[place], spread, atol=1e-4, rtol=1e-3)
    edit = iti_for(model, GOOD, BAD, k=3, strength=2.0)
    assert edit.heads == tuple(found.heads[i] for i in found.strongest(3))
    first = found.strongest(1)[0]
    wanted = found.spread[first] * found.direction[first]
    np.testing.assert_allclose(edit.vectors[0], wanted, atol=1e-5)
    assert shift_along(found, found.strongest(3), 2.0) == edit
    assert len(iti_for(model, GOOD, BAD).heads) == 2  # 48 of 1,024, of 32


def test_it_bakes(model: Any, tmp_path: Path) -> None:
    edit = iti_for(model, GOOD, BAD, k=4, strength=3.0)
    folder = interp.export(model, edit, tmp_path / "baked")
    ids = torch.arange(20)[None]
    with model.edit(edit):
        wanted = model.logits(ids)
    plain = hf.AutoModelForCausalLM.from_pretrained(folder)
    found = plain(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, model.logits(ids), atol=1e-2)
    assert plain.config.attention_bias


def test_files_hold_the_numbers(tmp_path: Path) -> None:
    edit = ShiftHeads({"L1H1": torch.tensor([0.1, -2.5])}, 0.5, "decode")
    assert interp.edits.load(interp.edits.save(tmp_path / "e.json", [edit])) == [edit]


def test_what_can_t_be_shifted(model: Any) -> None:
    for wrong in ({}, None, ["L1H1"], {"L1H1": []}, {"L1H1": [float("nan")]}, {"L1H1": "far"}):
        with pytest.raises(EditError):
            ShiftHeads(wrong)  # type: ignore[arg-type]
    with pytest.raises(EditError, match="twice"):
        ShiftHeads({"L1H1": [1.0], "1.1": [2.0]})
    with pytest.raises(EditError, match="2 numbers, and"), model.edit(ShiftHeads({"L1H1": [1, 2]})):
        model.logits(torch.arange(4)[None])
    with pytest.raises(EditError, match="2 numbers, and"):
        interp.export(model, ShiftHeads({"L1H1": [1, 2]}), "nowhere")
    with pytest.raises(InputError, match="at least 5 texts"):
        iti_for(model, GOOD[:4], BAD)
    with pytest.raises(InputError, match="1 to 32 heads"):
        iti_for(model, GOOD, BAD, k=33)
