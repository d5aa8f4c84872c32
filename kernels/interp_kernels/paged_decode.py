"""Attention of single query rows over a cache in pages, by the decode kernel: pages are read where
they lie, none is copied."""

from __future__ import annotations

from collections.abc import Sequence

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
        >>> serves(torch.ones(1, 4, 32), torch.ones(9, 2, 16, 32), torch.ones(9, 2, 12, 32))
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
        and max(q.shape[2], values.shape[3]) <= MAX_DIM
    )


def paged_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    change: RowChange | None = None,
    weighed: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Output (rows, heads, d_v) and weights (rows, heads, longest) of single queries, each over the
    first tokens of its pages.

        s = temper · scale · q·k + ln g        A = softmax(s)        z = A V

    The same as `paged.row_weights` and `paged.row_output`.

    Args:
        q: (rows, heads, d).
        keys, values: (pages, kv_heads, size, d) of the whole cache, in any strides.
        blocks: (rows, pages of the longest) int, each row's in their order; what stands behind its
            length is not read.
        lengths: tokens that each row sees.
        scale: of the logits.
        change: what edits do to the logits of all of them.
        weighed: whether the weights are wanted, a float32 a row, head and key of the longest.

    Returns:
        the outputs in the values' dtype, the weights in float32 or None.

    Raises:
        ValueError: what the kernel does not know (`serves`).

    Example:
        >>> from interp_kernels.paged_decode import paged_rows
        >>> cache = torch.ones(9, 1, 16, 32)
        >>> rows = torch.ones(1, 2, 32), cache, cache, torch.tensor([[7, 3]])
        >>> out, weights = paged_rows(*rows, [20], scale=1.0)
        >>> out.shape, weights.shape, round(float(weights[0, 0, 0]), 4)
        (torch.Size([1, 2, 32]), torch.Size([1, 2, 20]), 0.05)
    """
    (rows, heads, _), longest = q.shape, max(lengths)
    columns = blocks.shape[1] * keys.shape[2]
    seen = torch.arange(columns, device=q.device) < torch.tensor(
        list(lengths), device=q.device
    ).unsqueeze(1)
    vis = Visibility(Mask(causal=False, keys=seen), rows, heads, 1, columns, q.device)
    steers = () if change is None else (_steer(change, heads, columns, q.device),)
    call = Call(q[:, :, None], keys, values, vis, scale, steers=steers)
    found = decode(call, scores=weighed, pages=blocks.to(torch.int32))
    if not weighed:
        return found.out[:, :, 0], None
    assert found.scores is not None
    scores, lse = found.scores[:, :, 0, :longest], found.lse[:, :, 0, None]
    weights = torch.exp(scores - lse).masked_fill_(lse == -torch.inf, 0.0)
    return found.out[:, :, 0], weights


def _steer(change: RowChange, heads: int, columns: int, device: torch.device) -> Steer:
    """The change as the kernel takes it: ln g as a bias on every column."""
    temper = None if change.temper is None else change.temper.to(device)[None].float()
    bias: Tensor | None = None
    if change.spans:
        bias = torch.zeros(1, heads, columns, device=device)
        for start, stop, more in change.spans:
            bias[0, :, start:stop] += more.to(bias)
    return Steer(temper=temper, bias=bias)
