"""Directions of keys that tell relevance, from passages with and without the question that they
answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.checks import real
from interp.edits.keys import KeySet
from interp.edits.prompt_text import locate
from interp.edits.seka import SEKA, key_positions
from interp.errors import InputError, TapError
from interp.inputs.forward import forward
from interp.inputs.relevance import Passage, passages
from interp.inputs.tokenizer import Text
from interp.support.checked import whole_number
from interp_hooks.heads import Head
from interp_hooks.huggingface.rotations import rotations
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    from interp.model import Model

#: how many passages there are unless some are given
PASSAGES = 48


def seka_for(
    model: Any,
    keys: KeySet,
    examples: Sequence[Passage] | None = None,
    gain: float = 0.5,
    negative: float = 0.0,
    share: float = 0.9,
    k: int | None = None,
    seed: int = 0,
    centred: bool = False,
) -> SEKA:
    """The edit of SEKA for a model: projectors on what relevance does to keys, KV head by KV head.

    Of the keys of a passage's answer, after their norm and before rotation, h where the passage
    stands alone, h⁺ where the question that it answers stands before it, h⁻ where another does,

        Ω± = hᵀ h± / n = U± S± V±ᵀ      P⁺ = U⁺_{:,<r} U⁺_{:,<r}ᵀ,  Σ_{<r} S / Σ S ≥ share
        k ← k + g (P⁺ + ρ P⁻) k         P⁻ of the columns of U⁻ from there on

    in the `k` KV heads with the largest mean ‖h⁺ − h⁻‖ / mean ‖h‖ (Li et al. 2026, arXiv
    2603.01281: g = g⁺/2, ρ = g⁻/g⁺; there heads are those above a length that is searched for,
    not divided by that of the keys).

    Args:
        model: a HuggingFace model, or anything `interp.load` takes.
        keys: what is to be highlighted, as in `SEKA`.
        examples: passages; None for 48 that are made of a few forms.
        gain: g.
        negative: ρ; 0 leaves P⁻ out.
        share: of the singular values that P⁺ holds.
        k: KV heads; None for a quarter of all.
        seed: of the passages.
        centred: take each list's mean key off before Ω±, so that it is a covariance; not in the
            paper.

    Raises:
        InputError: fewer than two passages, a share outside 0 … 1, or more heads than there are.
        EditError: keys that are none, or an answer that is not in its passage.

    Misleads:
        Singular vectors of hᵀ h⁺ are led by what all keys of a head have in common, not by what the
        question changes, and queries may point away from that: on SmolLM2 a span that is
        highlighted so is read less. Put the same edit on another span beside it, and random
        projectors of the same rank.

    Example:
        >>> from interp.inputs.relevance import Passage
        >>> text = ["the cat saw the dog", "the man took a book"]
        >>> some = [Passage(t, "the cat", "the man", t.split()[-1]) for t in text]
        >>> edit = interp.edits.seka_for(model, (2, 4), some, k=3)
        >>> len(edit.heads), edit.matrices.shape
        (3, torch.Size([3, 32, 32]))
    """
    from interp.loading import load

    hooked = load(model)
    share, negative = real(share, "share of SEKA"), real(negative, "negative of SEKA")
    some = passages(PASSAGES, seed) if examples is None else list(examples)
    if len(some) < 2 or not 0 < share <= 1:
        raise InputError("SEKA is fitted to two passages at least, and to a share from 0 to 1.")
    heads, alone, relevant, other = relevance_keys(hooked, some)
    count = max(1, len(heads) // 4) if k is None else whole_number(k, "k of SEKA")
    if not 1 <= count <= len(heads):
        raise InputError(f"SEKA moves 1 to {len(heads)} KV heads of {hooked.name}, not {count}.")
    apart = (relevant - other).norm(dim=-1).mean(1) / alone.norm(dim=-1).mean(1)  # (heads,)
    if centred:
        alone, relevant, other = (x - x.mean(1, keepdim=True) for x in (alone, relevant, other))
    best = sorted(apart.argsort(descending=True, stable=True)[:count].tolist())
    matrices = [projector(alone[i], relevant[i], other[i], share, negative) for i in best]
    return SEKA(keys, [heads[i] for i in best], torch.stack(matrices).float(), gain)


def projector(
    alone: torch.Tensor, relevant: torch.Tensor, other: torch.Tensor, share: float, negative: float
) -> torch.Tensor:
    """(d, d): P⁺ + ρ P⁻ of keys (n, d) of one head."""

    def split(after: torch.Tensor) -> tuple[torch.Tensor, int]:
        left, size, _ = torch.linalg.svd(alone.T @ after / len(alone))
        held = size.cumsum(0) / size.sum()
        return left, int((held < share - 1e-12).sum()) + 1

    left, rank = split(relevant)
    made = left[:, :rank] @ left[:, :rank].T
    if negative:
        left, rank = split(other)
        made = made + negative * left[:, rank:] @ left[:, rank:].T
    return made


@torch.no_grad()
def relevance_keys(
    model: Model, some: Sequence[Passage]
) -> tuple[list[Head], torch.Tensor, torch.Tensor, torch.Tensor]:
    """KV heads, and (heads, n, d) float64 keys of the answers' tokens, passage after passage:
    alone, after the question that is answered, after another."""
    text = Text(model.tokenizer)
    rows: list[list[torch.Tensor]] = [[], [], []]
    heads: list[Head] = []
    for one in some:
        ids = text.encode(f" {one.text}")
        place = locate(model.tokenizer, ids, one.answer)
        if place is None:
            raise InputError(f"The answer {one.answer!r} is not in its passage.")
        for kind, asked in enumerate((None, one.relevant, one.irrelevant)):
            before = "Context:" if asked is None else f"Question: {asked}\nContext:"
            start = text.prompt(before)
            span = (len(start) + place[0], len(start) + place[1])
            heads, keys = _keys(model, [*start, *ids], span)
            rows[kind].append(keys)
    alone, relevant, other = (torch.cat(kind, 1) for kind in rows)
    return heads, alone, relevant, other


def _keys(model: Model, ids: list[int], span: tuple[int, int]) -> tuple[list[Head], torch.Tensor]:
    """KV heads, and (heads, tokens of the span, d) float64 keys before rotation."""
    try:
        turns = rotations(model)
    except TapError as error:
        raise InputError(f"SEKA can't be fitted to {model.name}: {error}") from error
    found: dict[int, torch.Tensor] = {}

    def note(stats: LayerStats) -> None:
        call = stats.call
        if not stats.site.is_main or call is None:
            return
        assert call.key is not None
        key = call.key[0, :, span[0] : span[1]].double().cpu()  # (kv_heads, m, d)
        turn = turns.at(stats.site.layer, key_positions(call)[0, span[0] : span[1]])
        found[stats.site.layer] = key if turn is None else torch.einsum("mij,nmi->nmj", turn, key)

    with model.clean(), model.watch(Question(call=True), note):
        forward(model, torch.tensor([ids]), keep=1)
    heads = [Head(layer, h) for layer in sorted(found) for h in range(len(found[layer]))]
    return heads, torch.cat([found[layer] for layer in sorted(found)])
