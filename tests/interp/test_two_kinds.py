"""Edits fitted to two lists of texts: CREST turns heads away, SADI amplifies those that differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.edits import RotateHeads, ScaleHeads, crest_for, sadi_for
from interp.edits.fit_crest import turned
from interp.edits.fit_iti import probe_heads
from interp.errors import EditError, InputError

THINGS = ("cat", "dog", "cup", "pen", "box", "boy", "girl", "ball")
GOOD = [f"the {x} saw the dog" for x in THINGS]
BAD = [f"the {x} gave a drink to" for x in THINGS]


def last(model: Any, texts: list[str]) -> np.ndarray:
    """(texts, layers, heads, d): z at the last token, a text at a time."""
    rows = []
    for text in texts:
        with model.capture_z() as z:
            model(text)
        rows.append(torch.stack([z[layer][0, -1] for layer in range(model.n_layers)]))
    return torch.stack(rows).double().detach().numpy()


def test_crest_turns_away_from_the_other_kind(pocket: Any) -> None:
    edit = crest_for(pocket, GOOD, BAD, k=4)
    probed = probe_heads(pocket, BAD, GOOD)
    assert edit == turned(probed, probed.strongest(4), 1.0) and edit.scope == "decode"
    gap = last(pocket, BAD).mean(0) - last(pocket, GOOD).mean(0)
    for head, vector in zip(edit.heads, edit.vectors, strict=True):
        wanted = gap[head.layer, head.head]
        np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted), atol=1e-4)
    assert len(crest_for(pocket, GOOD, BAD).heads) == round(0.38 * 32)
    # what is written shows nothing of the direction any more, and is as long as before
    always = RotateHeads(dict(zip(edit.heads, edit.vectors, strict=True)))
    first = min(edit.heads)
    with pocket.edit(always), pocket.capture_z() as z:
        pocket(BAD[0])
    with pocket.capture_z() as own:
        pocket(BAD[0])
    new, old = z[first.layer][0, :, first.head], own[first.layer][0, :, first.head]
    along = new @ torch.tensor(edit.vectors[edit.heads.index(first)])
    assert along.abs().max() < 1e-4 * old.norm(dim=-1).max()
    torch.testing.assert_close(new.norm(dim=-1), old.norm(dim=-1))


def test_sadi_is_a_gain_on_the_heads_that_differ_most(pocket: Any) -> None:
    edit = sadi_for(pocket, GOOD, BAD, k=5, strength=0.4)
    size = np.linalg.norm((last(pocket, GOOD) - last(pocket, BAD)).mean(0), axis=-1)
    best = np.argsort(-size, axis=None)[:5]
    places = [interp.Head(*map(int, np.unravel_index(i, size.shape))) for i in best]
    assert edit == ScaleHeads(dict.fromkeys(places, 1.4))
    assert len(sadi_for(pocket, GOOD, BAD).heads) == 1  # 2 % of 32


def test_what_they_refuse(pocket: Any) -> None:
    with pytest.raises(InputError, match="pairs"):
        sadi_for(pocket, GOOD, BAD[:3])
    with pytest.raises(InputError, match="two lists"):
        sadi_for(pocket, GOOD[0], BAD[0])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 to 32 heads"):
        sadi_for(pocket, GOOD, BAD, k=33)
    with pytest.raises(InputError, match="1 to 32 heads"):
        crest_for(pocket, GOOD, BAD, k=0)
    with pytest.raises(EditError, match="no direction"):
        RotateHeads({"L1H1": [0.0, 0.0]})
