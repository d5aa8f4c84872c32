"""Runs a model on one text and measures where a head looks: exact, in O(tokens) memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import ContextError, InputError, TapError
from interp.inputs.forward import forward
from interp.inputs.pieces import pieces
from interp.inputs.text import content
from interp.look.look import EDITED, OWN, Look, View
from interp.support.provenance import provenance
from interp_hooks.chatting import chat_inputs
from interp_hooks.heads import Head
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.token_ids import check_text
from interp_hooks.weight_rows import WeightRows

if TYPE_CHECKING:
    import numpy as np

    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.model import HookedModel

#: bytes that `attention` fills at most
MOST = 4 << 30


class _Seen(Exception):
    """Ends a forward whose layer was seen: what comes after it changes nothing here."""


def kept(tokens: int) -> tuple[int, int]:
    """How many keys of a query, and queries of a key, are kept: fewer of long texts, so that a page
    stays small."""
    if tokens <= 2048:
        return 16, 8
    return (10, 6) if tokens <= 8192 else (4, 3)


def ids_of(model: HookedModel, text: str | Path | torch.Tensor, chat: bool) -> torch.Tensor:
    """(1, tokens) ids of a text, of a chat whose only message it is, or ids as they are.

    Raises `InputError` for what is none of them, `ContextError` for more than the model reads.
    """
    if isinstance(text, torch.Tensor):
        ids = text.long().reshape(1, -1)
    elif model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, so it can't read a text; give token ids.")
    elif chat:
        ids = chat_inputs(model, content(text))["input_ids"]
    else:
        ids = torch.tensor([model.tokenizer.encode(check_text(content(text)), verbose=False)])
    if not ids.numel():
        raise InputError("The text has no tokens; give a longer one.")
    if model.max_context is not None and ids.shape[1] > model.max_context:
        raise ContextError(
            f"The text has {ids.shape[1]:,} tokens and {model.name} reads {model.max_context:,}; "
            "give a shorter one."
        )
    return ids


def site_of(model: HookedModel, head: Head) -> Site:
    """The self-attention that a head is of. Raises `HeadError`."""
    model.check(head)
    tower = head.tower or model.main_tower
    return next(s for s in model.sites if (s.layer, s.tower, s.kind) == (head.layer, tower, "self"))


@torch.no_grad()
def weights_of(
    model: HookedModel,
    text: str | Path | torch.Tensor,
    heads: Any = None,
    *,
    chat: bool = False,
    edits: Sequence[Any] = (),
) -> torch.Tensor:
    """Attention weights over a text; `Model.attention` has its arguments."""
    single = heads is not None and (
        isinstance(heads, Head) or (isinstance(heads, str) and "," not in heads) or _is_pair(heads)
    )
    asked = (
        [h for h in model.heads if h.tower == model.main_tower]
        if heads is None
        else [Head.parse(heads)] if single else _parsed(heads)
    )  # fmt: skip
    ids = ids_of(model, text, chat)
    n = ids.shape[1]
    _check_memory(len(asked), n)
    by_site: dict[Site, list[tuple[int, int]]] = {}
    for place, head in enumerate(asked):
        by_site.setdefault(site_of(model, head), []).append((place, head.head))
    out = torch.zeros(len(asked), n, n)

    def question(site: Site) -> Question:
        wanted = by_site.get(site)
        if wanted is None:
            return Question()

        def take(call: AttentionCall, start: int, a: torch.Tensor) -> None:
            rows = a[0].cpu()
            first = call.mask.q_start + start
            for i, (place, _) in enumerate(wanted):
                out[place, first : first + rows.shape[1], : rows.shape[2]] = rows[i]

        return Question(weights=WeightRows(take, tuple(h for _, h in wanted)))

    with (
        model.edit(*edits),
        model.watch(SiteQuestion(choose=question), lambda stats: None, "after"),
    ):
        forward(model, ids, keep=1)
    if single:
        return out[0]
    if heads is None and len(asked) == model.n_layers * model.n_heads:
        return out.view(model.n_layers, model.n_heads, n, n)
    return out


def _is_pair(heads: Any) -> bool:
    return (
        isinstance(heads, Sequence) and len(heads) == 2 and all(isinstance(x, int) for x in heads)
    )


def _parsed(heads: Any) -> list[Head]:
    from interp_hooks.heads import parse_heads

    return parse_heads(heads)


def _check_memory(heads: int, tokens: int) -> None:
    size = 4 * heads * tokens * tokens
    if size > MOST:
        one = int((MOST / 4) ** 0.5)
        raise InputError(
            f"The weights of {heads:,} heads over {tokens:,} tokens would take "
            f"{size / 2**30:,.0f} GiB; ask for fewer heads or a shorter text (one head: up to "
            f"{one:,} tokens), or take model.look(text, head), which keeps the strongest keys of "
            "each token at any length, or model.observe(...), which keeps statistics."
        )


@torch.no_grad()
def look_at(
    model: HookedModel,
    text: str | Path | torch.Tensor,
    head: Any,
    *,
    chat: bool = False,
    edits: Sequence[Any] = (),
) -> Look:
    """Where a head looks in a text; `Model.look` has its arguments."""
    target = Head.parse(head)
    site = site_of(model, target)
    if site.tower == "vision":
        raise InputError(
            f"{target} is of the vision tower, which reads no text; interp.overlay draws where "
            "heads look in a picture."
        )
    ids = ids_of(model, text, chat)
    started = time.time()
    views = {OWN: _view(model, ids, site, target.head, ())}
    if edits:
        views[EDITED] = _view(model, ids, site, target.head, edits)
    settings = dict(
        head=str(target),
        tokens=ids.shape[1],
        chat=chat,
        edits=[repr(e) for e in edits],
    )
    record = provenance(model, 0, settings, [ids])
    record["edits"] = [getattr(e, "phrase", repr(e)) for e in edits]
    record["seconds"] = round(time.time() - started, 2)
    words = pieces(model.tokenizer, ids[0].tolist())
    notes = []
    if _output_weights(model, site, target.head) is None:
        notes.append(
            "W_O of this model is not known, so that “by value” is a‖v‖ in place of a‖v W_O‖."
        )
    return Look(model.name, str(target), words, views, record, notes)


def _view(
    model: HookedModel, ids: torch.Tensor, site: Site, head: int, edits: Sequence[Any]
) -> View:
    gather = _Gather(head, _output_weights(model, site, head), *kept(ids.shape[1]))

    def question(at: Site) -> Question:
        return Question(weights=WeightRows(gather.take, (head,))) if at == site else Question()

    def stop(stats: Any) -> None:
        if stats.site == site:
            raise _Seen

    watched = model.watch(SiteQuestion(choose=question), stop, "after")
    try:
        with model.edit(*edits), watched:
            forward(model, ids, keep=1)
    except _Seen:  # what was asked for is here
        return gather.view()
    raise TapError(
        f"{model.name} ran without calling the attention of layer {site.layer}, so there is "
        "nothing to see; try another layer."
    )


def _output_weights(model: HookedModel, site: Site, head: int) -> torch.Tensor | None:
    """(d_head, d_model) W_O of a head; None where the model's are not known."""
    try:
        return model.head_weights(site.layer, site.tower).W_O[head]
    except TapError:
        return None


@dataclass
class _Rows:
    """Columns of a view that are filled row by row."""

    keys: list[torch.Tensor]
    weights: list[torch.Tensor]
    value_keys: list[torch.Tensor]
    values: list[torch.Tensor]
    first: list[torch.Tensor]
    value_first: list[torch.Tensor]
    moved: list[torch.Tensor]
    entropy: list[torch.Tensor]


class _Gather:
    """Takes a head's weights a few rows at a time, and keeps O(tokens) of them."""

    def __init__(self, head: int, W_O: torch.Tensor | None, k: int, r: int) -> None:
        self.head, self.W_O, self.k, self.r = head, W_O, k, r
        self.rows = _Rows([], [], [], [], [], [], [], [])
        self.norm: torch.Tensor | None = None

    def take(self, call: AttentionCall, start: int, a: torch.Tensor) -> None:
        if self.norm is None:
            self._begin(call)
        assert self.norm is not None
        a = a[0, 0]  # (rows, columns)
        columns = a.shape[1]
        moves = a * self.norm[:columns]  # a_k ‖v_k W_O‖
        moved = moves.sum(1, keepdim=True)
        shares = torch.where(moved > 0, moves / moved.clamp_min(1e-30), 0)
        for values, keys, weights in (
            (a, self.rows.keys, self.rows.weights),
            (shares, self.rows.value_keys, self.rows.values),
        ):
            top, index = values.topk(min(self.k, columns), 1)
            pad = (0, self.k - top.shape[1])
            keys.append(_padded(torch.where(top > 0, index, -1), pad, -1).int().cpu())
            weights.append(_padded(top, pad, 0).cpu())
        self.rows.first.append(a[:, 0].cpu())
        self.rows.value_first.append(shares[:, 0].cpu())
        self.rows.moved.append(moved[:, 0].cpu())
        self.rows.entropy.append(torch.special.entr(a).sum(1).cpu())
        self.total[:columns] += a.sum(0)
        self._receive(start, a)

    def _begin(self, call: AttentionCall) -> None:
        """‖v_k W_O‖ of each key, and empty columns."""
        value = call.value  # (1, kv_heads, keys, d)
        own = self.head * value.shape[1] // call.site.n_heads
        v = value[0, own].float()
        if self.W_O is None:
            self.norm = v.norm(dim=1)
        else:
            W_O = self.W_O.to(v)
            # v W_O W_Oᵀ vᵀ by the small Gram matrix: no (keys, d_model) is made
            self.norm = ((v @ (W_O @ W_O.T)) * v).sum(1).clamp_min(0).sqrt()
        keys = len(v)
        self.total = torch.zeros(keys, device=v.device)
        self.seen = queries_that_see(call)
        self.best = torch.zeros(keys, self.r, device=v.device)
        self.best_from = torch.full((keys, self.r), -1, device=v.device)

    def _receive(self, start: int, a: torch.Tensor) -> None:
        """The queries that look at each key most, so far and among these."""
        rows, columns = a.shape
        n = min(self.r, rows)
        top, index = a.T.topk(n, 1)  # (columns, n)
        both = torch.cat([self.best[:columns], top], 1)
        place = torch.cat([self.best_from[:columns], index + start], 1)
        best, which = both.topk(self.r, 1)
        self.best[:columns], self.best_from[:columns] = best, place.gather(1, which)

    def view(self) -> View:
        assert self.norm is not None

        def joined(parts: list[torch.Tensor]) -> np.ndarray:
            return torch.cat(parts).numpy()

        r = self.rows
        return View(
            keys=joined(r.keys),
            weights=joined(r.weights),
            value_keys=joined(r.value_keys),
            values=joined(r.values),
            first=joined(r.first),
            value_first=joined(r.value_first),
            moved=joined(r.moved),
            entropy=joined(r.entropy),
            received=(self.total.cpu() / self.seen).numpy(),
            total=self.total.cpu().numpy(),
            key_norm=self.norm.cpu().numpy(),
            queries=torch.where(self.best > 0, self.best_from, -1).int().cpu().numpy(),
            from_weights=self.best.cpu().numpy(),
        )


def queries_that_see(call: AttentionCall) -> torch.Tensor:
    """(keys,) how many queries of a text without padding see each key; 1 where none does."""
    n = call.n_keys
    key, window = torch.arange(n), call.mask.window or n
    last = (key + window - 1).clamp_max(n - 1)
    first = key if call.mask.causal else (key - window + 1).clamp_min(0)
    seen = last - first + 1
    seen[: call.mask.keep_first] = n - key[: call.mask.keep_first]
    return seen


def _padded(x: torch.Tensor, pad: tuple[int, int], value: float) -> torch.Tensor:
    return torch.nn.functional.pad(x, pad, value=value)
