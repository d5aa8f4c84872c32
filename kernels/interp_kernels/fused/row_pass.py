"""Statistics of edited weights, and the strongest keys of every row: a pass of queries and keys
that knows the log-sum-exp, and reads the few blocks again that can hold a row's strongest keys.

The k largest weights of a row lie in the k blocks of keys whose largest weights are largest: a
block that holds one of them, and is not among these, would be beaten by k others. So the first
kernel keeps a maximum a block, and the second one reads k blocks a row. Rows go through both some
at a time, since maxima of all of them would be (rows, keys / block).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..call import Call
from ..masking import FLOOR
from . import configs
from .configs import Config
from .edited import Edited
from .features import features_of
from .primitives import (
    INTERPRETED,
    LOG2E,
    dense_kind,
    device_of,
    flags,
    hides,
    loadable,
    parts,
    precision,
    schema,
    strides,
)
from .row_pass_kernels import row_kernel, top_kernel

#: Statistics this pass gives, in the order of its outputs.
NAMES = ("entropy", "max", "argmax", "distance", "capped_distance", "group_mass")
#: Log-sum-exp of a row that sees nothing: exp2(anything − NEVER) = 0.
NEVER = 1e30
#: Keys a block, of which a maximum is kept; more keys than `MAX_BLOCKS` of them, or more than
#: `MAX_TOPK` keys a row, are PyTorch's.
BLOCK, MAX_BLOCKS, MAX_TOPK = 8 if INTERPRETED else 32, 8192, 64
#: Maxima held at a time: 1 GiB on a GPU.
_CPU, _DEVICE = 1 << 16, 1 << 28


def why_not_topk(topk: int, keys: int) -> str:
    """Why the strongest keys of every row are not this pass' business, "" if they are."""
    if topk > MAX_TOPK:
        return f"more than {MAX_TOPK} keys a row"
    return f"more than {MAX_BLOCKS * BLOCK:,} keys" if keys > MAX_BLOCKS * BLOCK else ""


@torch.no_grad()
def row_pass(
    call: Call, lse: Tensor, edited: Edited, names: Sequence[str] = (), topk: int = 0
) -> dict[str, Tensor]:
    """Statistics of the weights as edited: those of `NAMES` that are in names, and topk_index and
    topk_prob of every row.

    logits = temper·softcap(scale·q·k) + bias, with temper and bias of the call's edit, whose rules
    and blend `edited` holds; lse (batch, heads, queries) natural, of those logits and of the sink
    if there is one, −inf where a row sees nothing.
    """
    asked, vis, steer, request = (
        [n for n in NAMES if n in names],
        call.vis,
        call.steer,
        call.request,
    )
    base2 = torch.where(lse <= FLOOR, NEVER, lse.float() * LOG2E)
    if edited.factors is not None:
        base2 = base2 + 0 * edited.factors.sum(-1)  # what is broken breaks its row, and is seen
    made = _row_pass(
        call.q, call.k, base2.contiguous(),
        None if vis.keys is None else vis.keys.contiguous(), vis.rows, steer.temper, steer.bias,
        None if call.mask.dense is None else call.mask.dense.to(call.q.device), vis.kept_from,
        edited.labels, edited.factors, edited.blend,
        None if request.labels is None else request.labels.to(call.q.device),
        call.scale, call.mask.causal, vis.offset, call.mask.window, vis.keep_first, call.softcap,
        " ".join(asked), request.n_groups, request.cap, topk,
    )  # fmt: skip
    found = [*asked, *(["topk_index", "topk_prob"] if topk else [])]
    return dict(zip(found, made, strict=True))


@dataclass(frozen=True)
class _Arguments:
    """What the operator takes."""

    q: Tensor
    k: Tensor
    lse: Tensor
    keys: Tensor | None
    real: Tensor | None
    temper: Tensor | None
    bias: Tensor | None
    dense: Tensor | None
    starts: Tensor | None
    labels: Tensor | None
    factors: Tensor | None
    blend: Tensor | None
    group_labels: Tensor | None
    scale: float
    causal: bool
    offset: int
    window: int | None
    keep_first: int
    softcap: float | None
    names: str
    n_groups: int
    cap: int
    topk: int


def _outputs(x: _Arguments) -> list[Tensor]:
    rows, made = x.q.shape[:3], []
    for name in x.names.split():
        shape = (*rows, x.n_groups) if name == "group_mass" else rows
        kind = torch.int64 if name == "argmax" else torch.float32
        made.append(x.q.new_empty(shape, dtype=kind))
    if x.topk:
        made += [x.q.new_empty(*rows, x.topk, dtype=kind) for kind in (torch.int64, torch.float32)]
    return made


@torch.library.custom_op("interp::row_pass", mutates_args=(), schema=schema(_Arguments, "Tensor[]"))
def _row_pass(*values: Any) -> list[Tensor]:
    x = _Arguments(*values)
    made = _outputs(x)
    (batch, heads, lq, _), lk = x.q.shape, x.k.shape[2]
    if not x.q.numel():
        return made
    if not lk:
        return [one.fill_(-1) if one.dtype == torch.int64 else one.zero_() for one in made]
    stats = dict(zip(x.names.split(), made, strict=False))
    if stats and (not x.topk or x.q.dtype == torch.float32):  # whose registers do not hold both
        with device_of(x.q):
            _Passes(x, stats).rows(0, lq, None)
        stats = {}
    if not x.topk:
        return made
    passes = _Passes(x, stats)
    budget = _CPU if x.q.device.type == "cpu" else _DEVICE
    each = max(1, budget // (batch * heads * triton.cdiv(lk, BLOCK)))
    for row0 in range(0, lq, each):
        row1 = min(row0 + each, lq)
        # later keys than the last row's no row sees
        end = min(max(row1 + x.offset, 1), lk) if x.causal else lk
        shape = (batch, heads, row1 - row0, triton.cdiv(end, BLOCK))
        tops = x.q.new_full(shape, -NEVER, dtype=torch.float32)
        with device_of(x.q):
            passes.rows(row0, row1, tops)
            passes.strongest(row0, row1, tops, made[-2], made[-1])
    return made


class _Passes:
    """The launches of one call, which differ in their rows."""

    def __init__(self, x: _Arguments, stats: dict[str, Tensor]) -> None:
        self.x, self.stats = x, stats
        self.dense = loadable(x.dense)
        self.groups = x.n_groups if "group_mass" in stats else 0
        self.features = None
        if self.groups:
            batch, lk = x.q.shape[0], x.k.shape[2]
            self.features = features_of(x.group_labels, self.groups, False, batch, lk, 1, x.q)
        # a pointer that no kernel reads, for what is not asked
        self.none = x.lse
        self.pointers = [
            x.q, x.k, x.lse, flags(x.keys), flags(x.real), x.temper, x.bias, self.dense, x.labels,
            x.factors, x.blend,
        ]  # fmt: skip
        self.strides = [
            *x.q.stride(),
            *x.k.stride(),
            strides(x.real, 2)[0],
            *strides(x.temper, 3),
            *strides(x.bias, 3),
            *strides(self.dense, 4),
            *strides(x.labels, 3),
            *strides(x.blend, 3),
        ]
        d = x.q.shape[3]
        self.flags = dict(
            D=d,
            DP=parts(d)[0],
            DP2=parts(d)[1],
            CAUSAL=x.causal,
            WINDOW=x.window is not None,
            KEPT=x.starts is not None,
            KEYS=x.keys is not None,
            REAL=x.real is not None,
            SOFTCAP=x.softcap is not None,
            TEMPER=x.temper is not None,
            BIAS=x.bias is not None,
            HIDES=hides(x.bias),
            DENSE=dense_kind(x.dense),
            DENSE_HIDES=hides(self.dense),
            GROUPS=0 if x.factors is None else x.factors.shape[-1],
            LABELS=x.labels is not None,
            BLEND=x.blend is not None,
        )
        self.numbers = [x.scale * LOG2E, (x.softcap or 0.0) * LOG2E]

    def _given(self, *more: Tensor | None) -> list[Tensor]:
        return [self.none if one is None else one for one in (*self.pointers, *more)]

    def rows(self, row0: int, row1: int, tops: Tensor | None) -> None:
        """Statistics of the rows row0 … row1, and the maxima of their blocks."""
        x, stats = self.x, self.stats
        (batch, heads, lq, _), (n_kv, lk) = x.q.shape, x.k.shape[1:3]

        def launch(config: Config) -> None:
            row_kernel[(triton.cdiv(row1 - row0, config.rows) * heads * batch,)](
                *self._given(self.features, x.starts, *(stats.get(name) for name in NAMES), tops),
                *self.strides,
                lq,
                lk,
                x.offset,
                x.window or 0,
                x.keep_first,
                x.cap,
                *self.numbers,
                n_kv,
                row0,
                row1,
                0 if tops is None else tops.shape[3],
                GROUP=heads // n_kv,
                BM=config.rows,
                BN=config.cols,
                BLOCK=BLOCK,
                ENTROPY="entropy" in stats,
                MAX="max" in stats,
                ARGMAX="argmax" in stats,
                DISTANCE="distance" in stats,
                CAPPED="capped_distance" in stats,
                MASSES=self.groups,
                FEATURES=0 if self.features is None else self.features.shape[-1],
                TOPS=tops is not None,
                INTERP=INTERPRETED,
                PRECISION=precision(x.q.dtype),
                num_warps=config.warps,
                num_stages=config.stages,
                enable_fp_fusion=True,
                **self.flags,
            )

        blocks = tops is not None
        biased = dense_kind(x.dense) == 2
        default = configs.row_pass(x.q.shape[3], x.q.dtype, x.q.device, blocks, biased)
        key = ("row_pass", x.q.shape, x.k.shape, x.q.dtype, x.causal, x.window, *stats, blocks)
        # a tile is of whole blocks
        fit = [one for one in configs.CANDIDATES if one.cols >= BLOCK or not blocks]
        launch(configs.tuned(key, default, fit, launch))

    def strongest(self, row0: int, row1: int, tops: Tensor, index: Tensor, prob: Tensor) -> None:
        """The strongest keys of the rows row0 … row1, from the maxima of their blocks."""
        x = self.x
        (batch, heads, lq, _), (n_kv, lk) = x.q.shape, x.k.shape[1:3]
        top_kernel[((row1 - row0) * heads * batch,)](
            *self._given(x.starts, tops, index, prob),
            *self.strides,
            lq,
            lk,
            x.offset,
            x.window or 0,
            x.keep_first,
            *self.numbers,
            row0,
            row1,
            tops.shape[3],
            HEADS=heads,
            GROUP=heads // n_kv,
            BLOCK=BLOCK,
            TILES=triton.next_power_of_2(tops.shape[3]),
            K=x.topk,
            KP=triton.next_power_of_2(x.topk),
            num_warps=4,
            enable_fp_fusion=True,
            **self.flags,
        )


@_row_pass.register_fake
def _(*values: Any) -> list[Tensor]:
    return _outputs(_Arguments(*values))
