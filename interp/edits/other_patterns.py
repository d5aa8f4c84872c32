"""Attention patterns that do not depend on the prompt at hand: another text's, or the own one dealt
out anew. The values stay the prompt's, so that what is lost is where a head looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp import tasks
from interp.errors import EditError
from interp.inputs.forward import forward
from interp.inputs.text import rows_of_text, text_rows
from interp.tasks.catalogue import FILES
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_hooks.shown_weights import row_weights
from interp_hooks.weight_rows import of_heads, ranges
from interp_kernels import attention, visible
from interp_kernels.masking import bias_visible

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall
    from interp_hooks.protocol import Model

#: tokens of the other text, at most
LENGTH = 2048
#: weights dealt out at once
AT_ONCE = 1 << 21

#: layer → (queries, keys) of one text, (heads, tokens, d) and (kv_heads, tokens, d)
Patterns = Mapping[int, tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def patterns_of(model: Model, reference: str | None, layers: set[int], seed: int) -> Patterns:
    """Queries and keys of another text, which make its pattern: English as shipped, a file, or a
    task's corrupted prompts one after the other; `LENGTH` tokens, or the model's context."""
    length = min(LENGTH, model.max_context or LENGTH)
    if reference is None:
        ids = rows_of_text(model.tokenizer, None, length, 1, seed)[0]
    elif not reference.endswith(FILES) and Path(reference).suffix and Path(reference).is_file():
        ids = text_rows(model, Path(reference), length, 1, seed)[0].input_ids[0].tolist()
    else:
        ids = []
        for instance in tasks.get(reference).sample(model.tokenizer, 256, seed):
            ids += list(instance.corrupted or instance.ids)[: length - len(ids)]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(stats: LayerStats) -> None:
        call = stats.call
        if call is not None and call.site.is_main and call.site.layer in layers:
            check(call, "frozen")
            assert call.query is not None and call.key is not None
            found[call.site.layer] = (call.query[0].clone(), call.key[0].clone())

    with model.clean(), model.watch(Question(call=True), note):
        forward(model, torch.tensor([ids]), keep=1)
    return found


def check(call: AttentionCall, mode: str) -> None:
    """Raise `EditError` where a call has no queries and keys of its own."""
    if call.query is None or call.key is None:
        raise EditError(
            f"ablate by {mode} needs queries and keys, and TransformerLens shows the weights; load "
            "the HuggingFace model."
        )


def frozen(call: AttentionCall, heads: Sequence[int], patterns: Patterns) -> torch.Tensor:
    """(batch, queries, heads, d): softmax(q' k'ᵀ)·v, q' and k' those of another text at the same
    token positions."""
    query, key = patterns[call.site.layer]
    own = of_heads(call, tuple(heads))
    kv = [h * key.shape[0] // query.shape[0] for h in heads]
    q = query[list(heads)][:, _places(call, call.n_queries, call.mask.q_start, query.shape[1])]
    k = key[kv][:, _places(call, call.n_keys, call.mask.k_start, query.shape[1])]
    q, k = (x.transpose(0, 1).to(call.value) for x in (q, k))  # (batch or 1, heads, tokens, d)
    q, k = (x.expand(call.batch, -1, -1, -1) for x in (q, k))
    return attention(q, k, own.value, **own.settings).out.transpose(1, 2)


def _places(call: AttentionCall, n: int, first: int, tokens: int) -> torch.Tensor:
    """(batch or 1, n) the token position of each slot first …; padding takes the first token."""
    slots = torch.arange(first, first + n, device=call.value.device)[None]
    starts = call.mask.starts
    place = slots if starts is None else slots - starts.to(slots.device)[:, None]
    if int(place.max()) >= tokens:
        raise EditError(
            f"ablate by frozen has the pattern of a text of {tokens} tokens, and this prompt is "
            "longer; shorten it."
        )
    return place.clamp_min(0)


def dealt(call: AttentionCall, heads: Sequence[int], seed: int) -> torch.Tensor:
    """(batch, queries, heads, d): each row's own weights, dealt out anew among the keys that it
    sees; entropy, maximum and the mass of a sink logit stay."""
    check(call, "random")
    own = of_heads(call, tuple(heads))
    out = []
    for start, stop in ranges(own, len(heads), AT_ONCE):
        part = own.part(start, stop)
        rows = row_weights(own, (), start, stop)  # (batch, heads, rows, keys)
        value = own.value.to(rows.dtype)
        out.append(shuffled(part, rows, _sees(part), heads, seed) @ value)
    return torch.cat(out, 2).transpose(1, 2).to(call.value.dtype)


def dealt_pattern(call: AttentionCall, heads: Sequence[int], seed: int) -> AttentionCall:
    """The call with the pattern of these heads dealt out anew, where a library shows it."""
    assert call.pattern is not None
    pattern = call.pattern.clone()
    mine = pattern[:, list(heads)]  # (batch, heads, queries, keys)
    sees = _sees(call)
    sees = sees if sees.shape[1] == 1 else sees[:, list(heads)]
    dealt_out = shuffled(call, mine.float(), sees, heads, seed)
    pattern[:, list(heads)] = dealt_out.to(pattern.dtype)
    return replace(call, pattern=pattern)


def _sees(call: AttentionCall) -> torch.Tensor:
    """(batch or 1, heads or 1, queries, keys) bool: who sees whom, by geometry and by what the
    model hides for each head."""
    dense = call.mask.dense
    plain = replace(call.mask, dense=None)
    sees = visible(plain, call.batch, call.n_queries, call.n_keys, call.value.device)
    if dense is None:
        return sees
    return sees & (dense if dense.dtype == torch.bool else bias_visible(dense)).to(sees.device)


def shuffled(
    call: AttentionCall,
    rows: torch.Tensor,
    sees: torch.Tensor,
    heads: Sequence[int],
    seed: int,
) -> torch.Tensor:
    """Weights (batch, heads, queries, keys) of these heads, each row's dealt out among the keys it
    sees (batch or 1, heads or 1, queries, keys)."""
    sees = sees.expand(rows.shape)
    hashed = _hashed(call, rows.shape[2], heads, seed, rows.device).expand(rows.shape)
    unseen = torch.iinfo(torch.int64).max
    drawn = hashed.masked_fill(~sees, unseen).argsort(dim=-1, stable=True)  # seen keys, shuffled
    there = (~sees).to(torch.uint8).argsort(dim=-1, stable=True)  # seen keys, in order
    return torch.zeros_like(rows).scatter(-1, there, rows.gather(-1, drawn))


def _hashed(
    call: AttentionCall, n: int, heads: Sequence[int], seed: int, device: Any
) -> torch.Tensor:
    """(batch or 1, heads, n, keys) int64 pseudo-random numbers of (seed, layer, head, query's and
    key's slot), so that prefill and decode deal alike."""
    mask = call.mask
    query = torch.arange(n, device=device)[None, :, None] + mask.q_start
    key = torch.arange(call.n_keys, device=device)[None, None] + mask.k_start
    head = torch.tensor(heads, device=device)[:, None, None] + 1009 * call.site.layer
    x = _mixed(_mixed(_mixed(head + 7919 * seed) + query) + key)
    return x[None]  # (1, heads, n, keys)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits (Mueller's), in int64 so that nothing overflows."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (x >> 16) ^ x
