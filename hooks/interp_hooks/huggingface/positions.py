"""Learned positions of padded rows.

Rotary positions are relative, and padding on the left moves nothing. A learned table is read at the
positions that the model counts: GPT-2 counts padding too, so a padded row reads other ones than the
same text alone. Those of the mask are put in its place where a caller gives none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from interp_hooks.errors import InterpError
from interp_hooks.logits import logits_of


@dataclass(frozen=True)
class Habit:
    """How a model counts positions that are not rotary.

    Attributes:
        first: the position of a text's first token (RoBERTa's follows the padding index); None
            where the model's own numbers are not known.
        counts_padding: causal, and text after padding is read at other positions than alone.
    """

    first: int | None = 0
    counts_padding: bool = False


@torch.no_grad()
def habit(
    run: Callable[..., Any], ids: torch.Tensor, takes_positions: bool, firsts: Sequence[int]
) -> Habit:
    """How a model counts positions that are not rotary.

    Args:
        run: its forward, untapped.
        ids: (1, tokens), some tokens.
        takes_positions: whether `position_ids` is among its arguments.
        firsts: what a text may begin at.
    """
    first: int | None = 0
    try:
        plain = logits_of(run(input_ids=ids)).float()
        if takes_positions:
            numbers = torch.arange(ids.shape[1]).to(ids)[None]
            for first in (*firsts, None):
                if first is None:
                    return Habit(None)
                counted = logits_of(run(input_ids=ids, position_ids=numbers + first)).float()
                if _same(plain, counted):
                    break
        other = ids.clone()
        other[:, -1] = ids[:, 0]
        if not _same(plain[:, 0], logits_of(run(input_ids=other))[:, 0].float()):
            return Habit(first)  # it reads both ways, so its rows are padded on the right
        padded = torch.nn.functional.pad(ids, (2, 0), value=int(ids[0, 0]))
        mask = torch.ones_like(padded)
        mask[:, :2] = 0
        late = logits_of(run(input_ids=padded, attention_mask=mask))[:, 2:].float()
    except (InterpError, ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        return Habit(first)  # it is not run so
    return Habit(first, not _same(plain, late))


def rotary(module: torch.nn.Module, config: Any) -> bool:
    """Whether positions turn queries and keys, so that only their differences count."""
    ropes = (getattr(config, name, None) for name in ("rope_parameters", "rope_theta"))
    return any(rope is not None for rope in ropes) or any(
        "rotary" in name or "rope" in name for name, _ in module.named_modules()
    )


@contextmanager
def reading(table: torch.nn.Module, numbers: torch.Tensor) -> Iterator[None]:
    """The table of learned positions is read at `numbers` (batch, new tokens) in a block, for
    models that take none (BART's decoder). A table that hands its positions on beside what it read
    (ProphetNet's, for relative ones of each layer) is left as it is."""

    def instead(module: Any, args: Any, output: Any) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor):
            return None
        places = numbers.to(output.device) + getattr(module, "offset", 0)
        return torch.nn.functional.embedding(places, module.weight).to(output)

    hook = table.register_forward_hook(instead)
    try:
        yield
    finally:
        hook.remove()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    close = 1e-3 if one.dtype in (torch.float32, torch.float64) else 3e-2
    return one.shape == other.shape and bool(
        (one.float() - other.float()).abs().max() <= close * one.float().abs().max()
    )


def of_mask(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """(batch, new tokens) positions of a forward's tokens among the real ones of their row; None
    where the mask hides nothing before a row's end, or does not say."""
    mask = inputs.get("attention_mask")
    new = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or new is None:
        return None
    cache: Any = inputs.get("past_key_values")
    before = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if mask.shape[1] != before + new.shape[1] or bool((mask[:, 0] != 0).all()):
        return None
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, before:]
