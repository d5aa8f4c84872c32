"""The matrices between what an attention reads and its call's queries, keys and values, where no
one module shows them: values scaled after their projection, latent attention without a norm,
queries whose numbers are put in another order.

The attention is run on the unit vectors, each a text of one token at position 0, where rotary
positions change nothing; what comes is held against a forward of real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from interp_hooks.huggingface.proof import WORDS, Record, Watched
from interp_hooks.huggingface.split import agree, tolerance

ByHead = tuple[torch.Tensor, torch.Tensor | None]


class FirstInput:
    """What an attention is given in a block's first forward: `args`, `kwargs`, and where in them
    the hidden states are."""

    def __init__(self, attention: torch.nn.Module):
        self.attention = attention
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}

    def __enter__(self) -> FirstInput:
        def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            self.args, self.kwargs = self.args or args, self.kwargs or kwargs

        self._hook = self.attention.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()

    def run(self, x: torch.Tensor) -> None:
        """Run the attention on other hidden states, (texts, d_model), each of one token."""
        rows = x[:, None]
        if "hidden_states" in self.kwargs:
            self.attention(*self.args, **{**self.kwargs, "hidden_states": rows})
        else:
            self.attention(rows, *self.args[1:], **self.kwargs)


def call_maps(record: Record, first: FirstInput, watched: Watched) -> Mapping[str, ByHead | str]:
    """place → (heads or kv_heads, d_model, d) and bias, or why there are none.

    Args:
        record: of a forward of real tokens, under `watched`.
        first: what the attention is given for one token at position 0.
    """
    assert record.x is not None
    width = record.x.shape[-1]
    real = record.x.reshape(-1, width)
    generator = torch.Generator().manual_seed(0)
    trial = torch.randn(4, width, generator=generator).to(real)
    rows = torch.cat([torch.zeros_like(trial[:1]), trial, torch.eye(width).to(real)])
    try:
        first.run(rows)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = f"its attention can't be run by itself ({type(error).__name__})"
        return dict.fromkeys(WORDS, reason)
    made: dict[str, ByHead | str] = {}
    for place, words in WORDS.items():
        out, target = watched.record.heads(place), record.heads(place)
        if len(out) != len(rows) or len(target) != len(real):
            made[place] = f"its {words} are not of the tokens that it reads"
            continue
        bias = out[0]
        weight = (out[5:] - bias).transpose(0, 1)  # (heads, d_model, d)

        def through(x: torch.Tensor, weight: Any = weight, bias: Any = bias) -> torch.Tensor:
            return torch.einsum("tm,hmd->thd", x, weight) + bias

        apart = (through(trial) - out[1:5]).abs().amax()
        if not bool(apart <= tolerance(out.dtype) * out[1:5].abs().amax().clamp_min(1e-30)):
            made[place] = f"its {words} are no linear map of what it reads (a norm between, say)"
        elif not agree(through(real), target, place != "v"):
            made[place] = f"its {words} depend on more than what it reads at their token"
        else:
            made[place] = weight.contiguous(), bias if bool(bias.any()) else None
    return made
