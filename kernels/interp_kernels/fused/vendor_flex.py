"""FlexAttention with FlashAttention 4 behind it, where the package `flash-attn-4` is installed.

PyTorch compiles it for each pair of lengths, some seconds each, so that it is for long texts alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

#: The fewest queries that are worth a compilation.
LONG = 16_384
#: Graphs that PyTorch may keep of it.
GRAPHS = 256
#: Rows and columns of a block of its mask.
BLOCK = 128
#: Capabilities (major) that FlashAttention 4 is made for.
MAJORS = (9, 10)


def refuses(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
    """Why it does not take such tensors, "" if it does."""
    if not q.is_cuda:
        return f"they are on {q.device.type}"
    return of_machine(torch.cuda.get_device_capability(q.device), q.shape[2], installed())


def of_machine(capability: tuple[int, int], rows: int, there: bool) -> str:
    """The same, of the GPU's capability, the query rows, and whether the package is there."""
    if capability[0] not in MAJORS:
        return f"FlashAttention 4 is not made for capability {capability[0]}.{capability[1]}"
    if not there:
        return "the package flash-attn-4 is not installed"
    return "" if rows >= LONG else f"fewer than {LONG:,} rows are not worth a compilation"


@lru_cache
def installed() -> bool:
    """Whether FlashAttention 4 can be imported."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:  # no flash_attn at all
        return False


def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out (batch, heads, queries, d_v) and its natural log-sum-exp (batch, heads, queries).

    Raises `RuntimeError` where PyTorch can't compile it.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    mask = _causal(q.shape[2], k.shape[2], q.device) if causal else None
    options: dict[str, Any] = dict(kernel_options={"BACKEND": "FLASH"}) if q.is_cuda else {}
    run = _attention(q.device.type)
    try:
        # each head dimension, grouping, scale and kind of lengths is a graph of its own
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            out, aux = run(
                q,
                k,
                v,
                block_mask=mask,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
                return_aux=AuxRequest(lse=True),
                **options,
            )
    except RuntimeError:
        raise
    except Exception as error:  # the compiler's own kinds are no RuntimeErrors
        raise RuntimeError(f"PyTorch can't compile FlexAttention for this call: {error}") from error
    return out, aux.lse


@lru_cache
def _attention(device: str) -> Callable[..., Any]:
    """`flex_attention`, compiled where it runs on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    own: Any = flex_attention
    return own if device == "cpu" else torch.compile(own, fullgraph=True)


@lru_cache(maxsize=8)
def _causal(queries: int, keys: int, device: torch.device) -> Any:
    """Aligned at the top left, as PyTorch means it."""
    from torch.nn.attention.flex_attention import BlockMask

    # by blocks: `create_block_mask` would hold queries × keys
    rows = torch.arange(-(-queries // BLOCK), device=device)[:, None]
    columns = torch.arange(-(-keys // BLOCK), device=device)
    seen = columns * BLOCK < ((rows + 1) * BLOCK).clamp_max(queries)
    inside = ((rows + 1) * BLOCK <= queries) & ((columns + 1) * BLOCK <= keys)
    full = (columns < rows) & inside
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=_before,
        seq_lengths=(queries, keys),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, rows) how many blocks of keys each block of queries has, (1, 1, rows, columns) which,
    those first."""
    count = blocks.sum(1, dtype=torch.int32)
    order = blocks.byte().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None], order[None, None]


def _before(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
