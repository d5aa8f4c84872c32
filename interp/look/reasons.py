"""Runs a model on one text and asks why a head looks where it looks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import TapError
from interp.inputs.forward import forward
from interp.inputs.one_token import token_id
from interp.inputs.pieces import pieces
from interp.look.measure import ids_of
from interp.look.why import Why
from interp.streams.qk import Reached, main_site, one_text, place_in, split
from interp.streams.sources import Sources, toward
from interp.support.provenance import provenance
from interp_hooks.heads import Head
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.shown_weights import row_weights
from interp_hooks.weight_rows import of_heads

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


@torch.no_grad()
def why_of(
    model: HookedModel,
    text: str | Path | torch.Tensor,
    head: Any,
    query: int | None = None,
    key: int | None = None,
    *,
    answer: str | int | None = None,
    against: str | int | None = None,
    chat: bool = False,
) -> Why:
    """Why a head looks from a query at a key; `Model.why` has its arguments."""
    started = time.time()
    target = model.check(Head.parse(head))
    main_site(model, target)
    ids = one_text(model, ids_of(model, text, chat))
    at = place_in(ids, -1 if query is None else query, "query")
    seen = hardest(model, ids, target, at) if key is None else place_in(ids, key, "key")
    qk = split(model, ids, target, at, seen)
    notes = _rounded(model, float(qk.table.sum()), qk.score)
    try:
        found, ends = _sources(model, ids, target, at, answer, against)
    except TapError as reason:
        found, ends = None, (None, None)
        notes.append(f"What its keys add to the answer is left out: {reason}")
    settings = dict(head=str(target), tokens=ids.shape[1], query=at, key=seen, chat=chat)
    record = provenance(model, 0, settings, [ids.cpu()])
    record["seconds"] = round(time.time() - started, 2)
    words = pieces(model.tokenizer, ids[0].tolist())
    said = [None if t is None else pieces(model.tokenizer, [t])[0] for t in ends]
    return Why(model.name, words, qk, found, said[0], said[1], record, notes)


def _rounded(model: HookedModel, total: float, score: float) -> list[str]:
    """What is said where the model's precision parts the pairs' sum from the score."""
    if abs(total - score) <= 1e-4 * max(1.0, abs(score)):
        return []
    dtype = str(next(model.module.parameters()).dtype).removeprefix("torch.")
    return [
        f"The model computes in {dtype}: the pairs sum to {total:.4g}, its own score is "
        f"{score:.4g}."
    ]


def _sources(
    model: HookedModel,
    ids: torch.Tensor,
    head: Head,
    at: int,
    answer: str | int | None,
    against: str | int | None,
) -> tuple[Sources, tuple[int | None, int | None]]:
    """By key, what the head adds to the answer's logit; the answer, the model's own where none is
    given, and what it is held against."""
    vocabulary = model.vocabulary()
    size = vocabulary.W_U.shape[1]
    ends = [None if t is None else token_id(model, t, size) for t in (answer, against)]

    def direction(final: torch.Tensor) -> torch.Tensor:
        if ends[0] is None:
            ends[0] = int(vocabulary.linear(final).argmax())
        W_U = vocabulary.W_U
        rival = W_U.mean(1, dtype=torch.float64) if ends[1] is None else W_U[:, ends[1]].double()
        return vocabulary.logit_scale * (W_U[:, ends[0]].double() - rival)

    found = toward(model, ids, at, head, direction)
    return found, (ends[0], ends[1])


@torch.no_grad()
def hardest(model: HookedModel, ids: torch.Tensor, head: Head, query: int) -> int:
    """The key that a head looks at most from a query, besides the first token, which is a sink;
    the first where it sees nothing else."""
    site = main_site(model, head)
    rows: list[torch.Tensor] = []

    def stop(stats: Any) -> None:
        if stats.site != site:
            return
        call = stats.call
        if call.pattern is not None:
            rows.append(call.pattern[0, head.head, query])
        else:
            part = of_heads(call, (head.head,)).part(query, query + 1)
            rows.append(row_weights(part, (), 0, 1)[0, 0, 0])
        raise Reached

    question = SiteQuestion(call=True, choose=lambda at: Question(call=True))
    try:
        with model.watch(question, stop):
            forward(model, ids, keep=1)
    except Reached:
        pass
    if not rows:
        raise TapError(f"{model.name} ran without calling the attention of layer {head.layer}.")
    row = rows[0].clone()
    row[0] = 0
    return int(row.argmax())
