"""What the norms of a model do, found by probing them: RMSNorm, LayerNorm, gains stored as w or as
1 + w."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from interp_hooks.errors import TapError
from interp_hooks.wrapping import device_of

#: largest difference, relative to the largest magnitude, that counts as equal; some norms compute
#: in float32 always
CLOSE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
#: magnitude of the probes: ε of the norm vanishes beside its square, and half precision holds it
#: exactly
LARGE = 1024.0


@dataclass(frozen=True)
class Frozen:
    """A norm linearised at an input x, its scale 1/σ(x) held: r ↦ gain ⊙ (r − mean(r) if it
    centres) / σ(x).

    `scale` is 1/σ(x), (…, 1) float64. The norm itself is frozen(x) + `bias`.
    """

    norm: Norm
    scale: torch.Tensor

    def __call__(self, r: torch.Tensor) -> torch.Tensor:
        """(…, d_model) float64; leading dimensions broadcast against `scale`."""
        return self.norm.centred(r.to(self.scale)) * self.norm.gain * self.scale

    @property
    def bias(self) -> torch.Tensor:
        """(d_model,) float64, zero in norms without one."""
        return self.norm.bias


@dataclass(frozen=True)
class Norm:
    """y = gain ⊙ (x − mean(x) if `centres`) / σ(x) + bias; gain and bias (d_model,) float64."""

    module: torch.nn.Module
    gain: torch.Tensor
    bias: torch.Tensor
    centres: bool

    def centred(self, r: torch.Tensor) -> torch.Tensor:
        return r - r.mean(-1, keepdim=True) if self.centres else r

    def fold_in(self, weight: torch.Tensor) -> torch.Tensor:
        """(…, d_model, n) float64: the weight that reads the stream itself, up to 1/σ: centring,
        then gain."""
        gained = self.gain[:, None] * weight.to(self.gain)
        return gained - gained.mean(-2, keepdim=True) if self.centres else gained

    def fold_out(self, weight: torch.Tensor) -> torch.Tensor:
        """(…, n, d_model) float64: the weight whose output has passed the norm, up to 1/σ."""
        return self.centred(weight.to(self.gain)) * self.gain

    @torch.no_grad()
    def frozen(self, x: torch.Tensor) -> Frozen:
        """The norm linearised at `x` (…, d_model). Raises `TapError` where gain ⊙ x/σ + bias is not
        what it gives."""
        target = self.module(x).double() - self.bias.to(x.device)
        direction = self.centred(x.double()) * self.gain.to(x.device)  # (…, d_model)
        scale = (target * direction).sum(-1, keepdim=True) / direction.square().sum(
            -1, keepdim=True
        ).clamp_min(1e-300)
        size = float(target.abs().max().clamp_min(1e-30))
        if not float((target - direction * scale).abs().max()) <= CLOSE.get(x.dtype, 2e-2) * size:
            raise TapError(
                f"{type(self.module).__name__} is neither an RMS norm nor a layer norm: gain ⊙ x/σ "
                "+ bias does not "
                "give its output, so it can't be linearised."
            )
        return Frozen(self, scale)


@torch.no_grad()
def read(module: torch.nn.Module, d_model: int) -> Norm:
    """Gain, bias and centring of a norm, by probing: at a large v of mean 0 it gives gain ⊙ v /
    rms(v) + bias.

    Raises `TapError` when it is no norm of this kind.
    """
    example = next(module.parameters(), torch.zeros(()))
    device = device_of(module) if example.is_meta else example.device  # meta: offloaded
    v = torch.ones(d_model, dtype=example.dtype, device=device)
    v[1::2] = -1
    v = (v - v.mean()) * LARGE  # no entry is 0, also where d_model is odd
    try:
        zero, once, twice, moved = (
            module(p[None, None])[0, 0].double() for p in (0 * v, v, 2 * v, v + LARGE)
        )
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise TapError(
            f"{type(module).__name__} does not take (batch, tokens, {d_model}): {error}"
        ) from error
    close = CLOSE.get(v.dtype, 2e-2) * float(once.abs().max())
    if not float((once - twice).abs().max()) <= close:
        raise TapError(f"{type(module).__name__} is no norm: its output grows with its input.")
    wide = v.double()
    gain = (once - zero) / wide * wide.square().mean().sqrt()
    norm = Norm(module, gain, zero, float((once - moved).abs().max()) <= close)
    draw = torch.Generator().manual_seed(0)
    norm.frozen(torch.randn(1, 4, d_model, generator=draw).to(v))
    return norm


def frozen(module: torch.nn.Module, x: torch.Tensor) -> Frozen:
    """The linear map r ↦ gain ⊙ (r − mean(r) if it centres) / σ(x) of a norm at x (…, d_model).

    Raises `TapError` when neither an RMS norm nor a layer norm reproduces module(x) =
    frozen(module, x)(x) + bias.
    """
    return read(module, x.shape[-1]).frozen(x)


class Norms:
    """The norms of a model's blocks, each read when it is asked for.

    `attention(layer)`: between the stream and the attention, None where attention reads the stream
    itself; `branch(layer)`: between the attention's output and the stream (Gemma 2, OLMo 2), None
    where there is none; `final()`: before the unembedding. All raise `TapError` for what is no RMS
    or layer norm.
    """

    def __init__(
        self,
        before: Mapping[int, torch.nn.Module | str | None],
        after: Mapping[int, torch.nn.Module | None],
        last: torch.nn.Module | None,
        d_model: int,
    ):
        self._before, self._after, self._last, self.d_model = before, after, last, d_model
        self._read: dict[int, Norm] = {}

    def attention(self, layer: int) -> Norm | None:
        before = self._before[layer]
        if isinstance(before, str):
            raise TapError(before)
        return self._norm(before)

    def branch(self, layer: int) -> Norm | None:
        return self._norm(self._after[layer])

    def final(self) -> Norm | None:
        return self._norm(self._last)

    def _norm(self, module: torch.nn.Module | None) -> Norm | None:
        if module is None or isinstance(module, torch.nn.Identity):
            return None
        if id(module) not in self._read:
            self._read[id(module)] = read(module, self.d_model)
        return self._read[id(module)]


def _first(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else None
    return tensor if isinstance(tensor, torch.Tensor) else None


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (
        a is not None
        and b is not None
        and a.numel() == b.numel()
        and torch.equal(a.flatten(), b.flatten())
    )


@torch.no_grad()
def find(
    blocks: Mapping[int, torch.nn.Module],
    attentions: Mapping[int, torch.nn.Module],
    last: torch.nn.Module | None,
    run: Callable[[], Any],
) -> Norms:
    """The norms around each attention, by what goes in and out in one forward: the norm before
    attention takes the block's input and gives the attention's; a branch norm takes the attention's
    output."""
    calls: dict[int, dict[torch.nn.Module, tuple[torch.Tensor | None, torch.Tensor | None]]] = {
        n: {} for n in blocks
    }

    def watch(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            calls[layer][module] = (
                _first(args, kwargs),
                out if isinstance(out, torch.Tensor) else None,
            )

        return hook

    with ExitStack() as stack:
        for layer, block in blocks.items():
            inside = set(attentions[layer].modules()) - {attentions[layer]}
            for module in block.modules():
                if module not in inside:
                    handle = module.register_forward_hook(watch(layer), with_kwargs=True)
                    stack.callback(handle.remove)
        run()
    before: dict[int, torch.nn.Module | str | None] = {}
    after: dict[int, torch.nn.Module | None] = {}
    width = 0
    for layer, block in blocks.items():
        if block is attentions[layer] or not {block, attentions[layer]} <= set(calls[layer]):
            raise TapError(
                f"Layer {layer} has no block around its attention, so its norms can't be told."
            )
        stream, _ = calls[layer].pop(block)
        attention_in, attention_out = calls[layer].pop(attentions[layer])
        if stream is None:
            raise TapError(f"Block {layer} takes no hidden states, so its norms can't be told.")
        width = stream.shape[-1]
        before[layer] = None
        if not _same(stream, attention_in):
            makers = [
                m
                for m, (i, o) in calls[layer].items()
                if _same(i, stream) and _same(o, attention_in)
            ]
            before[layer] = (
                makers[0]
                if makers
                else f"What layer {layer} does before its attention is not one norm."
            )
        takers = [
            m for m, (i, o) in calls[layer].items() if _same(i, attention_out) and not _same(o, i)
        ]
        after[layer] = takers[0] if takers else None
    return Norms(before, after, last, width)
