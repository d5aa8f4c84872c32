"""WAAD and FAI curves against their definition on the eager attention weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.errors import InputError


def test_curves_equal_the_definition() -> None:
    model = interp.load("llama")
    text = "The old king crossed the river near a tower. Every fox liked the song. " * 5
    ids = torch.tensor([model.tokenizer.encode(text)])
    model.module.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model.module(ids, output_attentions=True).attentions
    model.module.set_attn_implementation("sdpa")
    a = torch.cat([w[0] for w in weights]).double().numpy()  # (all heads, queries, keys)
    t = a.shape[1]
    assert t > 70
    back = np.arange(t)[:, None] - np.arange(t)[None]
    span = (a * back).sum(-1).mean(-1)
    order = np.argsort(span)
    n = max(1, round(0.3 * len(span)))
    local, far = a[order[:n]].mean(0), a[order[-n:]].mean(0)
    waad = [sum(local[q, s] * min(q - s, 10) for s in range(q + 1)) for q in range(t)]
    fai = [
        np.mean([far[q, s] for q in range(s + 10, min(t - 1, s + 50) + 1)]) if s + 10 < t else 0.0
        for s in range(t)
    ]
    curve = interp.rhythm(model, text)
    np.testing.assert_allclose(curve["waad"], waad, atol=1e-4)
    np.testing.assert_allclose(curve["fai"], fai, atol=1e-5)
    assert list(curve["token"]) == model.tokenizer.convert_ids_to_tokens(ids[0])


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(InputError, match="fewer than two tokens"):
        interp.rhythm("llama", "")
