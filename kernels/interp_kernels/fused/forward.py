"""Launching the forward kernel: one state (output, log-sum-exp) and the statistics asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from . import configs, specialised
from .configs import Config
from .features import features_of
from .forward_kernel import forward_kernel
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

#: Statistics this kernel gives, in the order of its outputs.
NAMES = ("entropy", "max", "argmax", "distance", "capped_distance", "group_mass")


@dataclass
class State:
    """Normalised output (batch, heads, queries, d_v) over some keys, and their log-sum-exp (batch,
    heads, queries)."""

    out: Tensor
    lse: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Keys:
    """Which keys a state is over: all of them, those that `keep` (batch or 1, heads or 1, keys)
    marks, or the first `counts` (batch, heads) of the ascending columns `lists` (batch, heads, n)
    int32. `ends` (batch, 2) int32: no kept key stands before or after."""

    keep: Tensor | None = None
    ends: Tensor | None = None
    lists: Tensor | None = None
    counts: Tensor | None = None

    @staticmethod
    def padding(keys: Tensor | None) -> Keys:
        """The real tokens of (batch, keys) bool; None: all."""
        if keys is None:
            return Keys()
        n = keys.shape[1]
        order = torch.arange(n, device=keys.device)
        start = (
            torch.where(keys, order, n).amin(1)
            if n
            else keys.new_zeros(keys.shape[0], dtype=torch.long)
        )
        stop = torch.where(keys, order + 1, 0).amax(1) if n else start
        return Keys(keys[:, None].contiguous(), torch.stack([start, stop], 1).to(torch.int32))

    def group(self, labels: Tensor, group: int, batch: int, heads: int) -> Keys:
        """Those of them that `labels` (batch or 1, heads or 1, keys) puts into `group`; 0, the
        largest, by mask and the others as lists. Nothing here waits for the device."""
        chosen = labels == group
        if self.keep is not None:
            chosen = chosen & self.keep
        if group == 0:
            ends = self.ends
            if ends is None:
                ends = torch.zeros(batch, 2, dtype=torch.int32, device=labels.device)
                ends[:, 1] = labels.shape[-1]
            return Keys(chosen, ends)
        n = labels.shape[-1]
        place = torch.where(
            chosen, chosen.long().cumsum(-1) - 1, n
        )  # n: a column past the end, cut off again
        columns = torch.arange(n, dtype=torch.int32, device=labels.device).expand_as(place)
        lists = torch.zeros(*place.shape[:2], n + 1, dtype=torch.int32, device=labels.device)
        lists = lists.scatter_(-1, place, columns)[..., :n]
        counts = chosen.sum(-1, dtype=torch.int32)
        return Keys(
            lists=lists.expand(batch, heads, n), counts=counts.expand(batch, heads).contiguous()
        )


def forward(call: Call, keys: Keys = Keys(), names: Sequence[str] = ()) -> State:
    """Attention over `keys`: softmax(temper·softcap(scale·q·k) + bias)·v, or σ in place of the
    softmax, with temper, bias and σ of the call's edit.

    q, k and v in any layout. lse is natural, −inf where a row sees nothing. names: of `NAMES`.
    """
    asked, steer, request = [name for name in NAMES if name in names], call.steer, call.request
    vis, dense = call.vis, call.mask.dense
    out, lse, *found = _forward(
        call.q, call.k, call.v, keys.keep, keys.ends, keys.lists, keys.counts, vis.rows,
        call.sinks, steer.temper, steer.bias, None if dense is None else dense.to(call.q.device),
        vis.kept_from,
        None if request.labels is None else request.labels.to(call.q.device),
        call.scale, call.mask.causal, vis.offset, call.mask.window, vis.keep_first, call.softcap,
        steer.sigmoid, " ".join(asked), request.n_groups, request.cap,
    )  # fmt: skip
    return State(out, lse, dict(zip(asked, found, strict=True)))


def _outputs(q: Tensor, v: Tensor, names: str, n_groups: int) -> list[Tensor]:
    batch, heads, lq, _ = q.shape
    # the layout of q, so that a model's (batch, queries, heads, d) view of the output is contiguous
    # again
    out = v.new_empty(batch, lq, heads, v.shape[3]).transpose(1, 2)
    made = [out, q.new_empty(batch, heads, lq, dtype=torch.float32)]
    for name in names.split():
        kind = torch.int64 if name == "argmax" else torch.float32
        shape = (batch, heads, lq, n_groups) if name == "group_mass" else (batch, heads, lq)
        made.append(q.new_empty(shape, dtype=kind))
    return made


def _tiles_that_hide(keep: Tensor, size: int) -> Tensor:
    """(batch or 1, heads or 1, tiles) uint8: some key of the tile is not kept."""
    padding = -keep.shape[-1] % size
    return (
        (~torch.nn.functional.pad(keep, (0, padding), value=True))
        .unflatten(-1, (-1, size))
        .any(-1)
        .to(torch.uint8)
    )


@dataclass(frozen=True)
class _Arguments:
    """What the operator takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None
    ends: Tensor | None
    lists: Tensor | None
    counts: Tensor | None
    real: Tensor | None
    sinks: Tensor | None
    temper: Tensor | None
    bias: Tensor | None
    dense: Tensor | None
    starts: Tensor | None
    labels: Tensor | None
    scale: float
    causal: bool
    offset: int
    window: int | None
    keep_first: int
    softcap: float | None
    sigmoid: float | None
    names: str
    n_groups: int
    cap: int


def _dressed(x: _Arguments) -> bool:
    """Whether a tile's logits are changed, or hidden by more than causality."""
    more = (x.window, x.sigmoid, x.softcap, x.lists, x.temper, x.bias, x.dense)
    return any(one is not None for one in more)


def _work(x: _Arguments) -> int:
    """What the loop over tiles does beside the softmax, which wants registers too."""
    if x.names:
        return configs.STATISTICS
    return configs.DRESSED if _dressed(x) else configs.PLAIN


def _plain(x: _Arguments) -> bool:
    """Whether causality is all that is asked of the mask, and nothing of the logits."""
    return not _dressed(x) and all(one is None for one in (x.keep, x.real, x.sinks))


def _candidates(x: _Arguments, known: bool) -> tuple[Config, ...]:
    """What autotuning tries; known: to the specialised kernel."""
    hopper = configs.family(x.q.device) == 90
    return configs.CANDIDATES + (configs.SPECIALISED if known and hopper else ())


@torch.library.custom_op("interp::forward", mutates_args=(), schema=schema(_Arguments, "Tensor[]"))
def _forward(*values: Any) -> list[Tensor]:
    x = _Arguments(*values)
    q, k, v = x.q, x.k, x.v
    made = _outputs(q, v, x.names, x.n_groups)
    if not q.numel():
        return made
    batch, heads, lq, d = q.shape
    n_kv, lk, d_v = k.shape[1], k.shape[2], v.shape[3]
    out, lse, *found = made
    stats = dict(zip(x.names.split(), found, strict=True))
    dense = loadable(x.dense)

    def launch(config: Config) -> None:
        if config.specialised:
            if not _plain(x):
                raise ValueError("The specialised kernel knows causality alone.")
            plain = specialised.Plain(q, k, v, x.scale, x.causal, x.offset)
            specialised.launch(config, plain, out, lse, stats)
            return
        dirty = None if x.keep is None else _tiles_that_hide(x.keep, config.cols)
        groups = x.n_groups if "group_mass" in stats else 0
        features = features_of(
            x.labels, groups, "distance" in stats and x.causal, batch, lk, config.cols, q
        )
        forward_kernel[(-(-lq // config.rows) * heads * batch,)](
            q,
            k,
            v,
            out,
            lse,
            *(stats.get(name) for name in NAMES),
            flags(x.keep),
            dirty,
            x.ends,
            flags(x.real),
            x.sinks,
            x.temper,
            x.bias,
            dense,
            x.starts,
            features,
            x.lists,
            x.counts,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride()[:3],
            *strides(x.keep, 3),
            *strides(dirty, 3)[:2],
            strides(x.real, 2)[0],
            *strides(x.temper, 3),
            *strides(x.bias, 3),
            *strides(dense, 4),
            *strides(x.lists, 3)[:2],
            lq,
            lk,
            x.offset,
            x.window or 0,
            x.keep_first,
            x.cap,
            x.scale * LOG2E,
            (x.softcap or 0.0) * LOG2E,
            (x.sigmoid or 0.0) * LOG2E,
            n_kv,
            GROUP=heads // n_kv,
            BM=config.rows,
            BN=config.cols,
            D=d,
            DP=parts(d)[0],
            DP2=parts(d)[1],
            DV=d_v,
            DVP=parts(d_v)[0],
            DVP2=parts(d_v)[1],
            CAUSAL=x.causal,
            WINDOW=x.window is not None,
            KEPT=x.starts is not None,
            KEEP=x.keep is not None,
            LISTED=x.lists is not None,
            DENSE=dense_kind(x.dense),
            DENSE_HIDES=hides(dense),
            SINK=x.sinks is not None,
            SOFTCAP=x.softcap is not None,
            TEMPER=x.temper is not None,
            BIAS=x.bias is not None,
            HIDES=hides(x.bias),
            SIGMOID=x.sigmoid is not None,
            REAL=x.real is not None,
            ENTROPY="entropy" in stats,
            MAX="max" in stats,
            ARGMAX="argmax" in stats,
            DISTANCE="distance" in stats,
            CAPPED="capped_distance" in stats,
            GROUPS=groups,
            FEATURES=0 if features is None else features.shape[-1],
            INTERP=INTERPRETED,
            PRECISION=precision(q.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )

    with device_of(q):
        also = "biased" if dense_kind(x.dense) == 2 else "" if x.keep is None else "hidden"
        default = configs.forward(max(d, d_v), q.dtype, _work(x), q.device, also)
        known = specialised.serves(q, k, v, x.names, not _plain(x))
        key = (
            "forward",
            known,
            q.shape,
            k.shape,
            d_v,
            q.dtype,
            x.causal,
            x.window,
            x.names,
            x.softcap is None,
            x.dense is None,
            q.device,
        )
        launch(configs.tuned(key, default, _candidates(x, known), launch))
    return made


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    return _outputs(q, v, *rest[-3:-1])
