"""Heads under patterns that do not read the prompt: another text's, and the own one dealt out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from interp.edits import Ablate
from interp.edits.other_patterns import dealt, frozen
from interp.errors import EditError
from interp.inputs.text import rows_of_text
from interp_hooks import HookedModel
from interp_hooks.call import AttentionCall, Site
from interp_kernels import Mask, visible
from interp_kernels.reference import weights

Worded = Callable[[str], tuple[HookedModel, Any]]
MODELS = ["llama", "gpt2"]
LENGTH = 20


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(5, 95, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def unit_call(mask: Mask, heads: int = 4, keys: int = 12, sinks: bool = False) -> AttentionCall:
    """A call whose values are unit vectors, so that z is the pattern."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, keys - mask.q_start, 8, generator=gen, dtype=torch.float64)
    k = torch.randn(2, heads // 2, keys, 8, generator=gen, dtype=torch.float64)
    v = torch.eye(keys, dtype=torch.float64).expand(2, heads // 2, -1, -1)
    s = torch.randn(heads, generator=gen, dtype=torch.float64) if sinks else None
    site = Site("", 1, "self", "", heads, heads // 2, keys)
    return AttentionCall(site, q, k, v, mask, 8**-0.5, sinks=s)


#: each head hides keys of its own
BY_HEAD = torch.rand(1, 4, 12, 12, generator=torch.Generator().manual_seed(7)) < 0.7


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=False),
        Mask(window=4),
        Mask(starts=torch.tensor([0, 3])),
        Mask(q_start=7),
        Mask(dense=BY_HEAD),
        Mask(dense=torch.where(BY_HEAD, 0.5, -torch.inf).double()),
    ],
    ids=["causal", "both ways", "window", "padded", "chunk", "flags by head", "bias by head"],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_random_deals_each_row_out_among_what_it_sees(mask: Mask, sinks: bool) -> None:
    call = unit_call(mask, sinks=sinks)
    a = weights(call.query, call.key, **call.settings)  # (batch, heads, queries, keys)
    z = a.transpose(1, 2)
    got = Ablate("1.0, 1.3", "random", seed=5).attend(call, z).transpose(1, 2)
    sees = visible(replace(mask, dense=None), 2, call.n_queries, 12, a.device).expand(a.shape)
    sees = sees & (BY_HEAD if mask.dense is not None else torch.tensor(True))
    assert torch.equal(got[:, [1, 2]], a[:, [1, 2]])
    for h in (0, 3):
        torch.testing.assert_close(got[:, h].sort(-1).values, a[:, h].sort(-1).values)
        assert not bool(got[:, h][~sees[:, h]].any())
        many = sees[:, h].sum(-1) > 3
        moved = (got[:, h] - a[:, h]).abs().amax(-1) > 1e-9
        assert float(moved[many].double().mean()) > 0.6
    assert not torch.equal(got[:, 0], Ablate("1.0", "random", seed=6).attend(call, z)[:, :, 0])


def test_random_deals_evenly() -> None:
    """Over seeds every key gets the mean weight of the row, within four standard errors."""
    call = unit_call(Mask(), keys=9)
    a = weights(call.query, call.key, **call.settings)
    z = a.transpose(1, 2)
    n = 400
    found = torch.stack(
        [Ablate("1.2", "random", seed=s).attend(call, z)[0, -1, 2] for s in range(n)]
    )
    row = a[0, 2, -1]
    error = row.std(unbiased=False) / n**0.5
    assert float((found.mean(0) - row.mean()).abs().max()) < 4 * float(error)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_frozen_is_another_text_s_pattern(worded: Worded, name: str, padded: bool) -> None:
    """z = A'·v with A' the eager weights of the other text, v the prompt's, in the first layer."""
    model, plain = worded(name)
    ids = tokens()
    mask = torch.ones_like(ids)
    start = 4 if padded else 0
    mask[1, :start] = 0
    other = torch.tensor(rows_of_text(model.tokenizer, None, model.max_context, 1, 3))
    given = dict(input_ids=ids, attention_mask=mask, position_ids=tiny.positions(mask))
    with torch.no_grad():
        a = plain(input_ids=other, output_attentions=True).attentions[0][0].double()
        with model.capture_z() as before:
            model.logits(**given)
        with model.edit(Ablate("0.1, 0.2", "frozen", seed=3)), model.capture_z() as z:
            model.logits(**given)
    v = values(model, given)  # (batch, heads, tokens, d)
    for row, begin in ((0, 0), (1, start)):
        n = LENGTH - begin
        for h in (1, 2):
            want = a[h, :n, :n] @ v[row, h, begin:]
            torch.testing.assert_close(z[0][row, begin:, h].double(), want, atol=1e-5, rtol=1e-4)
        for h in (0, 3):
            torch.testing.assert_close(z[0][row, begin:, h], before[0][row, begin:, h])


def values(model: HookedModel, given: Any) -> torch.Tensor:
    """(batch, heads, tokens, d) of the first layer."""
    from interp_hooks import Question

    calls: list[AttentionCall] = []
    with torch.no_grad(), model.watch(Question(call=True), lambda s: calls.append(s.call)):
        model.logits(**given)
    value = calls[0].value
    return value.repeat_interleave(calls[0].query.shape[1] // value.shape[1], 1).double()


def test_the_other_text_may_be_a_file_or_a_task(worded: Worded, tmp_path: Path) -> None:
    model, _ = worded("llama")
    text = tmp_path / "other.txt"
    text.write_text("the cat saw the dog . " * 80)
    ids = tokens()
    found = []
    for reference in (None, text, "ioi"):
        with torch.no_grad(), model.edit(Ablate("0.1", "frozen", reference)):
            found.append(model.logits(ids))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_what_is_refused() -> None:
    call = unit_call(Mask())
    few = {1: (call.query[0, :, :8], call.key[0, :, :8])}
    with pytest.raises(EditError, match="a text of 8 tokens, and this prompt is longer"):
        frozen(call, [0], few)
    shown = AttentionCall(
        call.site, None, None, call.value, Mask(), 1.0, pattern=torch.ones(2, 4, 12, 12)
    )
    with pytest.raises(EditError, match="needs queries and keys"):
        dealt(shown, [0], 0)
