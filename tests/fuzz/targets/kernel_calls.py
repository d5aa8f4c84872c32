"""Arguments of `interp_kernels.attention`: shapes, types, strides, masks, NaN, nothing at all."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from interp_kernels import Mask, Received, Request, Rule, Steer, attention

from ..target import Target, raised_by

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
ROW = ["entropy", "max", "argmax", "distance", "capped_distance", "group_mass", "nonsense"]
sizes = st.sampled_from([1, 1, 2, 2, 3, 4, 8, 1, 2, 3, 5, 0])


#: logits below minus this are taken for hidden keys
LARGEST = 1e28


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of about this shape: sometimes of another rank, type or device, strided, or with
    NaN, infinities and huge numbers in it."""
    seed = draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.integers(0, 59)) == 0:
        shape = draw(st.sampled_from([shape[1:], (*shape, 1), shape[::-1], (0, *shape[1:])]))
    x = torch.randn(shape, generator=generator)
    odd = draw(st.integers(0, 39))
    if odd == 1 and x.numel():
        x.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e38]))
    elif odd == 2 and x.ndim == 4:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif odd == 3 and x.ndim:
        x = x[..., :1].expand(shape)
    elif odd == 4:
        x = x.to(draw(st.sampled_from(DTYPES)))
    elif odd == 5 and draw(st.booleans()):
        x = x.to("meta")
    elif odd == 6 and x.ndim == 4:
        x = torch.randn((*shape[:2], shape[2] * 2, shape[3]), generator=generator)[:, :, ::2]
    return x


def whole(shape: tuple[int, ...], low: int, high: int) -> st.SearchStrategy[Any]:
    """Integer tensors, of the shape or of another."""
    shapes = st.sampled_from([shape] * 20 + [shape[:-1], (*shape, 1), (0, *shape[1:])])
    return st.builds(
        lambda s, seed: torch.randint(
            low, max(high, low + 1), s, generator=torch.Generator().manual_seed(seed)
        ),
        shapes,
        st.integers(0, 5),
    )


def flags(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    return whole(shape, 0, 2).map(lambda x: x.bool())


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[torch.Tensor], dict[str, Any]]:
    batch, kv, group, lq, lk, d = (draw(sizes) for _ in range(6))
    heads = kv * group
    if draw(st.integers(0, 29)) == 0:
        heads += 1
    qkv = [
        draw(tensors((batch, heads, lq, d))),
        draw(tensors((batch, kv, lk, d))),
        draw(tensors((batch, kv, lk, draw(st.sampled_from([d, d, 0, 1, 5]))))),
    ]
    settings: dict[str, Any] = {}
    if draw(st.booleans()):
        settings["mask"] = draw(masks(batch, heads, lq, lk))
    if draw(st.booleans()):
        settings["request"] = draw(
            requests(batch, heads, lq, lk) if draw(st.integers(0, 15)) else _strange
        )
    if draw(st.integers(0, 2)) == 0:
        settings["steer"] = draw(
            steers(batch, heads, lq, lk) if draw(st.integers(0, 15)) else _strange
        )
    if draw(st.integers(0, 4)) == 0:
        settings["sinks"] = draw(tensors((heads,)))
    if draw(st.integers(0, 4)) == 0:
        settings["scale"] = draw(st.sampled_from([0.0, -1.0, 1e30, float("nan"), "1", None, 2]))
    if draw(st.integers(0, 4)) == 0:
        settings["softcap"] = draw(st.sampled_from([0.0, -1.0, 1.0, 50.0, float("nan"), "1"]))
    backends = ["reference", "streaming", "auto", "streaming"] * 4 + ["nonsense", None, 3]
    settings["backend"] = draw(st.sampled_from(backends))
    return qkv, settings


_strange = st.sampled_from([None, 1, "mask", {}, [], ()])


@st.composite
def masks(draw: st.DrawFn, batch: int, heads: int, lq: int, lk: int) -> Any:
    if draw(st.integers(0, 19)) == 0:
        return draw(_strange)
    said: dict[str, Any] = {"causal": draw(st.booleans())}
    numbers = st.sampled_from([0, 1, 2, 3, -1, 10**12, 2**70, 1.5, "2", None])
    for name in ("window", "q_start", "k_start", "keep_first"):
        if draw(st.integers(0, 3)) == 0:
            said[name] = draw(st.one_of(st.sampled_from([0, 1, 2, 3]), numbers))
    if draw(st.integers(0, 2)) == 0:
        said["keys"] = draw(flags((batch, lk)))
    if draw(st.integers(0, 3)) == 0:
        said["queries"] = draw(flags((batch, lq)))
    if draw(st.integers(0, 3)) == 0:
        shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), lq, lk)
        said["dense"] = draw(st.one_of(flags(shape), tensors(shape), whole(shape, 0, 2)))
    if draw(st.integers(0, 3)) == 0:
        said["starts"] = draw(st.one_of(whole((batch,), -2, 5), tensors((batch,))))
    return Mask(**said)


@st.composite
def requests(draw: st.DrawFn, batch: int, heads: int, lq: int, lk: int) -> Any:
    said: dict[str, Any] = {"names": frozenset(draw(st.lists(st.sampled_from(ROW), max_size=3)))}
    if draw(st.booleans()):
        said["labels"] = draw(st.one_of(whole((batch, lk), -2, 6), tensors((batch, lk))))
        said["n_groups"] = draw(st.sampled_from([0, 1, 2, 3, 16, 17, -1, 2.0]))
    if draw(st.integers(0, 2)) == 0:
        pairs = st.one_of(whole((batch, lq, 2), -3, lk + 1), tensors((batch, lq, 2)))
        said["pairs"] = {"x": draw(pairs)}
    if draw(st.integers(0, 2)) == 0:
        said["received"] = {"r": draw(received(batch, heads, lq, lk))}
    if draw(st.integers(0, 2)) == 0:
        said["topk"] = draw(st.sampled_from([0, 1, 3, 99, -1, 1.5, 10**9]))
        if draw(st.booleans()):
            said["topk_rows"] = draw(st.one_of(whole((2,), -2, lq + 1), tensors((2,))))
    if draw(st.integers(0, 3)) == 0:
        said["cap"] = draw(st.sampled_from([0, 1, -1, 10**30, 1.5, "x"]))
    said["out"], said["lse"] = draw(st.booleans()), draw(st.booleans())
    return Request(**said)


@st.composite
def received(draw: st.DrawFn, batch: int, heads: int, lq: int, lk: int) -> Any:
    said: dict[str, Any] = {"reduce": draw(st.sampled_from(["mean", "sum", "max", "min", 1]))}
    if draw(st.booleans()):
        said["queries"] = draw(st.one_of(flags((batch, lq)), tensors((batch, lq))))
    if draw(st.booleans()):
        said["band"] = draw(st.sampled_from([(0, 1), (1, 0), (-3, 3), (10**12, 2**70), (1,), "ab"]))
    if draw(st.integers(0, 2)) == 0:
        said["keys"] = draw(
            st.one_of(whole((batch, heads, 2), -3, lk + 1), tensors((batch, heads, 2)))
        )
    return Received(**said)


def _size(value: torch.Tensor) -> torch.Tensor:
    """|value|; truths, which have none, as they are."""
    return value if value.dtype == torch.bool else value.abs()


@st.composite
def steers(draw: st.DrawFn, batch: int, heads: int, lq: int, lk: int) -> Any:
    said: dict[str, Any] = {}
    for name, shape in (
        ("temper", (batch, heads, lq)),
        ("bias", (batch, heads, lk)),
        ("gain", (batch, heads, lq)),
        ("blend", (heads,)),
    ):
        if draw(st.integers(0, 3)) == 0:
            said[name] = draw(tensors(shape))
    if draw(st.integers(0, 7)) == 0:
        said["sigmoid"] = draw(st.sampled_from([0.0, -2.0, float("nan"), float("inf"), "x"]))
    if draw(st.integers(0, 2)) == 0:
        groups = draw(st.integers(1, 3))
        if draw(st.booleans()):
            said["labels"] = draw(
                st.one_of(whole((batch, heads, lk), -1, groups + 1), tensors((batch, heads, lk)))
            )
        else:
            spans = [((0, 1, 1),), ((1, 0, 1),), ((0, 99, 0),), ((0, 1, 9),), ((0, 1),), ("abc",)]
            said["spans"] = draw(st.sampled_from(spans))
        keep = _size(draw(tensors((1, groups)))) if draw(st.booleans()) else torch.ones(1, groups)
        said["rule"] = Rule(
            keep=keep,
            receive=draw(st.one_of(st.none(), tensors((1, groups)))),
            renormalise=draw(st.booleans()),
        )
    return Steer(**said)


class KernelCalls(Target):
    """`attention` by the reference and by the streaming route, held against each other."""

    name = "kernels"

    def inputs(self) -> st.SearchStrategy[Any]:
        return st.builds(_Call, _attempts())

    def run(self, value: Any) -> str:
        if value.error is not None:
            raise value.error
        (q, k, v), settings = value.made
        result = attention(q, k, v, **settings)
        if q.device.type == "meta":
            return "right: meta"
        exact = attention(
            *(x.double() for x in (q, k, v)),
            **{**settings, "backend": "reference"},
        )
        if not torch.isfinite(exact.out).all() or not all(
            torch.isfinite(x.double()).all() for x in (q, k, v)
        ):
            return "right: not finite"
        if q.numel() and k.numel():
            largest = float(q.abs().max()) * float(k.abs().max()) * q.shape[-1]
            if largest * abs(settings.get("scale") or 1.0) > LARGEST:
                return "right: logits beyond what can be told from hidden keys"
        lowest = min((q, k, v), key=lambda x: torch.finfo(x.dtype).bits).dtype
        tolerance = {torch.float64: 1e-6, torch.float32: 2e-4}.get(lowest, 0.1)
        if exact.out.shape == result.out.shape:
            torch.testing.assert_close(
                result.out.double(), exact.out, rtol=tolerance, atol=tolerance
            )
        return "right"

    def refused(self, error: BaseException) -> bool:
        """The kernels' refusals are `ValueError`s and `TypeError`s that their own code raises."""
        file, line = raised_by(error)
        ours = "interp_kernels" in file and line.lstrip().startswith("raise ")
        return isinstance(error, ValueError | TypeError) and ours and len(str(error)) > 10


class _Call:
    """A call, or the error that making its parts raised."""

    def __init__(self, made: Any):
        self.made, self.error = (made, None) if not isinstance(made, Exception) else (None, made)

    def __repr__(self) -> str:
        if self.made is None:
            return f"parts that raise {self.error!r}"
        (q, k, v), settings = self.made
        shown = ", ".join(f"{tuple(x.shape)} {x.dtype} {x.device}" for x in (q, k, v))
        return f"{shown}; {settings}"


@st.composite
def _attempts(draw: st.DrawFn) -> Any:
    try:
        return draw(calls())
    except (ValueError, TypeError, AttributeError) as error:
        return error
