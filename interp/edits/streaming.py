"""Streaming attention: the first tokens and the recent ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.head_edit import HeadEdit
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_hooks.whole_numbers import quoted, whole
from interp_kernels import visible

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model


#: more tokens than any context has; what is larger overflows an index
LARGEST = 2**40


@dataclass(frozen=True)
class Streaming(HeadEdit):
    """Restricts attention to the first `sink` tokens and the `recent` last ones (StreamingLLM).

    Each query sees the first `sink` tokens of its sample and the `recent` last ones, itself
    included (Xiao et al., ICLR 2024, arXiv 2309.17453). Positions stay the tokens' own (there they
    are counted inside the cache) and the cache keeps everything: this shows what such a model would
    miss.

    Layers with a sliding window of their own are left as they are.

    Args:
        sink: first tokens of each sample, 0 or more.
        recent: last tokens, the query's own included, 1 or more.
        heads: whole layers (all their heads), None for all; for single KV heads use `Gate`.
        scope: "all", "prefill" or "decode".

    Misleads:
        It saves no memory, and positions stay the text's own. Loss does not see what is lost: with
        4 + 512 tokens SmolLM2's does not move, and nearly half of its needles at 1,024 tokens go.

    Raises:
        EditError: sink < 0 or recent < 1, some heads of a layer only; in use, a model that sees
            later tokens.

    Example:
        >>> edit = interp.edits.Streaming(sink=1, recent=2)
        >>> with model.edit(edit), model.observe("topk", topk=8, stage="after") as seen:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> keys = seen[2].topk_index[0, 0, 7]  # of row 7, which sees three
        >>> sorted(keys[keys >= 0].tolist())
        [0, 6, 7]
    """

    sink: int = 4
    recent: int = 1024
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"

    name = "streaming"

    def __post_init__(self) -> None:
        super().__post_init__()
        sink, recent = check_sizes(self.name, self.sink, self.recent)
        object.__setattr__(self, "sink", sink)
        object.__setattr__(self, "recent", recent)

    def check_model(self, model: Model) -> None:
        super().check_model(model)
        self.check_whole_layers(model, "gate takes single KV heads")

    def touches(self, call: AttentionCall) -> bool:
        return super().touches(call) and open_ended(call)

    def before(self, call: AttentionCall) -> AttentionCall:
        return streamed(call, self.sink, self.recent, self.name)

    def route(self, site: Site) -> str:
        return f"streaming: a mask of {self.sink} first and {self.recent} recent tokens"


def check_sizes(name: str, sink: Any, recent: Any) -> tuple[int, int]:
    """(sink, recent) as Python's numbers. Raise `EditError` unless they are whole and leave
    something to see."""
    first, last = whole(sink), whole(recent)
    if first is None or last is None or not (0 <= first < LARGEST and 1 <= last < LARGEST):
        raise EditError(
            f"{name} takes sink tokens from 0 and recent tokens from 1 up, not {quoted(sink)} and "
            f"{quoted(recent)}."
        )
    return first, last


def open_ended(call: AttentionCall) -> bool:
    """Whether the call has no sliding window of its own (one with first tokens kept is from an
    edit)."""
    return call.mask.window is None or call.mask.keep_first > 0


def streamed(call: AttentionCall, sink: int, recent: int, name: str) -> AttentionCall:
    """The call under a streaming mask. Raises `EditError` where queries see later tokens, and where
    an edit before made a mask that neither holds the new one nor is held by it."""
    mask = call.mask
    if not mask.causal and mask.dense is None and call.n_queries > 1:
        raise EditError(f"{name} needs a causal model; in this one tokens see later ones.")
    if mask.window is not None:
        if mask.window <= recent and mask.keep_first <= sink:
            return call
        if mask.window < recent or mask.keep_first < sink:
            raise EditError(
                f"{name} meets a streaming mask of {mask.keep_first} first and {mask.window} "
                "recent tokens; two such "
                "masks go together if one holds the other."
            )
    window_mask = replace(mask, window=recent, keep_first=sink)
    if call.pattern is None:
        return replace(call, mask=window_mask)
    batch, _, queries, keys = call.pattern.shape
    seen = visible(window_mask, batch, queries, keys, call.pattern.device)
    return replace(call, mask=window_mask, pattern=restricted(call.pattern, seen))


def restricted(pattern: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Weights (batch, heads, queries, keys) as the softmax over the `seen` keys, bool of a shape
    that broadcasts, would give them."""
    weights = torch.where(seen, pattern, 0)
    gone = (1 - pattern.sum(-1, keepdim=True)).clamp_min(0)
    sink = torch.where(gone > 1e-3, gone, 0)  # less is rounding, not the share of a sink logit
    total = weights.sum(-1, keepdim=True) + sink
    return weights / torch.where(total > 0, total, 1)
