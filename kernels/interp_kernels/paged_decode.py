"""Attention of one query row over a cache in pages, by the decode kernel: pages are read where they
lie, none is copied."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .fused.capable import usable
from .fused.decode import decode
from .fused.primitives import DTYPES, MAX_DIM
from .masking import Mask, Visibility
from .paged import RowChange
from .steer import Steer


def serves(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel reads such pages on this device: of two to some power of tokens, 16 at
    least, on a GPU that the kernels accept.

    Example:
        >>> from interp_kernels.paged_decode import serves
        >>> serves(torch.ones(4, 32), torch.ones(9, 2, 16, 32), torch.ones(9, 2, 12, 32))
        False
    """
    size = keys.shape[2]
    return (
        not usable(q.device)
        and size >= 16
        and size & (size - 1) == 0
        and size == values.shape[2]
        and {q.dtype, keys.dtype, values.dtype} <= set(DTYPES)
        and q.dtype == keys.dtype
        and max(q.shape[1], values.shape[3]) <= MAX_DIM
    )


def paged_row(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    length: int,
    *,
    scale: float,
    change: RowChange | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (heads, d_v) and weights (heads, length) of one query over the first `length` tokens
    of its pages.

        s = temper · scale · q·k + ln g        A = softmax(s)        z = A V

    The same as `paged.row_weights` and `paged.row_output`.

    Args:
        q: (heads, d).
        keys, values: (pages, kv_heads, size, d) of the whole cache, in any strides.
        blocks: (pages of the row,) int, in their order; what stands behind `length` is not seen.
        length: tokens seen.
        scale: of the logits.
        change: what edits do to the logits.

    Returns:
        the output in the values' dtype, the weights in float32.

    Raises:
        ValueError: what the kernel does not know (`serves`).

    Example:
        >>> from interp_kernels.paged_decode import paged_row
        >>> cache = torch.ones(9, 1, 16, 32)
        >>> row = torch.ones(2, 32), cache, cache, torch.tensor([7, 3])
        >>> out, weights = paged_row(*row, 20, scale=1.0)
        >>> out.shape, weights.shape, round(float(weights[0, 0]), 4)
        (torch.Size([2, 32]), torch.Size([2, 20]), 0.05)
    """
    heads, columns = q.shape[0], len(blocks) * keys.shape[2]
    vis = Visibility(Mask(q_start=length - 1), 1, heads, 1, columns, q.device)
    steers = () if change is None else (_steer(change, heads, columns, q.device),)
    call = Call(q[None, :, None], keys, values, vis, scale, steers=steers)
    found = decode(call, scores=True, pages=blocks[None].to(torch.int32))
    assert found.scores is not None
    scores, lse = found.scores[0, :, 0, :length], found.lse[0, :, 0, None]
    weights = torch.exp(scores - lse).masked_fill_(lse == -torch.inf, 0.0)  # (heads, length)
    return found.out[0, :, 0], weights


def _steer(change: RowChange, heads: int, columns: int, device: torch.device) -> Steer:
    """The change as the kernel takes it: ln g as a bias on every column."""
    temper = None if change.temper is None else change.temper.to(device)[None].float()
    bias: Tensor | None = None
    if change.spans:
        bias = torch.zeros(1, heads, columns, device=device)
        for start, stop, more in change.spans:
            bias[0, :, start:stop] += more.to(bias)
    return Steer(temper=temper, bias=bias)
