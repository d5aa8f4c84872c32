"""Sink tokens of a residual stream, found while the model reads a prompt and remembered while it
writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import EditError
from interp_hooks.huggingface.layout import text_config

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall
    from interp_hooks.protocol import Model


@dataclass(frozen=True)
class _Published:
    """Sink dimensions of a language model, and what its config says."""

    dims: tuple[int, ...]
    config: dict[str, Any]


#: VAR's paper; those of Qwen2-VL and InternVL2 are second-hand. The KV heads tell LLaMA-2 (Vicuna)
#: from LLaMA-3.
PUBLISHED = (
    _Published(
        (1415, 2533),
        dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_key_value_heads=32),
    ),
    _Published(
        (2100, 4743),
        dict(model_type="llama", hidden_size=5120, num_hidden_layers=40, num_key_value_heads=40),
    ),
    _Published(
        (458, 2570), dict(model_type="qwen2_vl_text", hidden_size=3584, num_hidden_layers=28)
    ),
    _Published((3584,), dict(model_type="internlm2", hidden_size=4096, num_hidden_layers=32)),
)


def published_dims(model: Model) -> tuple[int, ...] | None:
    """The sink dimensions published for this model's language model; None where there are none."""
    text = _language(model)
    for entry in PUBLISHED:
        if all(getattr(text, name, None) == value for name, value in entry.config.items()):
            return entry.dims
    return None


def stream_width(model: Model) -> int | None:
    """d_model of the language model; None where its config does not say."""
    return getattr(_language(model), "hidden_size", None)


def _language(model: Model) -> Any:
    return text_config(model.module) if hasattr(model.module, "config") else None


#: The paper's τ, and how far beyond it |x| / RMS(x) must be able to go for it to be taken.
TAU, MARGIN = 20.0, 1.1
#: A median of fewer tokens (an image's, or a prompt's words) says nothing about a dimension.
FEW = 8


def tau_of(width: int | None) -> float:
    """τ of sinks for a stream of this width: the paper's 20 wherever a token can reach it.

    |x| / RMS(x) is at most √d_model (one dimension holds all), 64 at LLaVA's 4096; from 484 on it
    can be 10 % above 20. In narrower streams τ is the same share of what is possible as 20 is
    there, 0.31·√d_model.
    """
    reachable = width is None or width**0.5 >= MARGIN * TAU
    return TAU if reachable else TAU * (width / 4096) ** 0.5  # type: ignore[operator]


def ratios(hidden: torch.Tensor) -> torch.Tensor:
    """|x[d]| / RMS(x), (batch, tokens, d_model) float32, of a residual stream of that shape."""
    x = hidden.float()
    return (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs()


def sink_dims(size: torch.Tensor, first: torch.Tensor, tau: float) -> torch.Tensor:
    """(batch, d_model) bool: the dimensions in which each sample's first real token is a sink, from
    `ratios` (batch, tokens, d_model) and the slots `first` (batch,): its massive activations."""
    return size[torch.arange(len(size), device=size.device), first.to(size.device)] >= tau


def shared_dims(
    size: torch.Tensor,
    tau: float,
    real: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
) -> torch.Tensor:
    """(batch, d_model) bool: the dimensions in which the median token reaches τ. They are a bias of
    the stream (SmolLM2's dimension 507, 11–13 times the RMS of every token), and tell no token from
    another.

    `size` is `ratios` (batch, tokens, d_model); `real` and `image` (batch, tokens) bool: tokens
    that are no padding (None: all), and the image's. With an image the median of its tokens alone
    counts too, and that of the words alone, where there are 8 or more.
    """
    high = size >= tau
    real = torch.ones_like(high[..., 0]) if real is None else real.to(high.device)
    kinds = [(real, 1)]
    if image is not None:
        image = image.to(high.device)
        kinds += [(real & image, FEW), (real & ~image, FEW)]
    shared = torch.zeros_like(high[:, 0])
    for kind, least in kinds:
        n = kind.sum(1)[:, None]  # (batch, 1)
        reached = (high & kind[..., None]).sum(1)  # (batch, d_model)
        shared |= (2 * reached > n) & (n >= least)
    return shared


def named_dims(size: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """(batch, d_model) bool: these dimensions in every sample."""
    mask = torch.zeros(size.shape[-1], dtype=torch.bool, device=size.device)
    mask[list(dims)] = True
    return mask.expand(len(size), -1)


def are_sinks(size: torch.Tensor, dims: torch.Tensor, tau: float) -> torch.Tensor:
    """(batch, tokens) bool: φ(x) = max_{d in dims} |x[d]| / RMS(x) ≥ τ, from `ratios` (batch,
    tokens, d_model) and `dims` (batch, d_model) bool. No dimension: no sinks."""
    return size.masked_fill(~dims[:, None], 0).amax(-1) >= tau


def find_sinks(
    model: Model,
    stream: torch.Tensor,
    first: torch.Tensor,
    real: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sinks of a stream (batch, tokens, d_model) that enters a layer, (batch, tokens) bool, and
    whether each sample has a dimension to tell them by (batch,): those published for the model,
    else the massive activations of its first real token, in slot `first` (batch,); either without
    those that most tokens share (`shared_dims`, which says what `real` and `image` are)."""
    size, known = ratios(stream), published_dims(model)
    tau = tau_of(size.shape[-1])
    dims = sink_dims(size, first, tau) if known is None else named_dims(size, known)
    dims = dims & ~shared_dims(size, tau, real, image)
    return are_sinks(size, dims, tau), dims.any(-1)


@dataclass(frozen=True)
class _Layer:
    """What is known of one layer. sinks, marks (batch, slots): the sinks so far, and a number of
    each token's key, by which a row is known again after beams have changed places; dims (batch,
    d_model) bool."""

    sinks: torch.Tensor
    marks: torch.Tensor
    dims: torch.Tensor


class SinkMemory:
    """Sinks by layer: tokens with φ(x) = max_{d in dims} |x[d]| / RMS(x) ≥ τ in the stream that
    enters the layer.

    dims None: in each sample and layer, the dimensions that are ≥ τ at the sample's first real
    token, its massive activations (where there are none, the layer has no sinks). Dimensions in
    which the median token reaches τ are left out, but for those that a user names (`named`).
    """

    def __init__(self, dims: Sequence[int] | None, tau: float, named: bool = False) -> None:
        self.dims, self.tau, self.named = dims, tau, named
        self._layers: dict[int, _Layer] = {}
        self._counts: dict[int, tuple[int, int]] = {}

    def count(self, layer: int) -> tuple[int, int] | None:
        """(sinks, tokens) of the prompt read last in a layer, over its samples; None before."""
        return self._counts.get(layer)

    def see(self, call: AttentionCall) -> torch.Tensor:
        """(batch, slots) bool: the sinks of the call's layer up to its last row; a prompt's first
        call starts anew.

        Raises `EditError` for a model that does not show its stream, and for a text that was not
        seen from its start.
        """
        if call.hidden is None or call.key is None:
            raise EditError(
                "var finds sinks in the residual stream, which TransformerLens models "
                "do not show it; "
                "give text_sinks= and visual_sinks=, or load the HuggingFace model."
            )
        size = ratios(call.hidden)  # (batch, queries, d_model)
        start, layer = call.mask.q_start, call.site.layer
        before = self._before(call) if start else None
        dims = self._dims(call, size) if before is None else before.dims
        fresh = are_sinks(size, dims, self.tau)
        if call.mask.queries is not None:
            fresh = fresh & call.mask.queries.to(fresh.device)
        column = start - call.mask.k_start
        marks = call.key[:, 0, column : column + call.n_queries, 0].clone()  # not the whole cache
        if before is not None:
            fresh = torch.cat([before.sinks, fresh], 1)
            marks = torch.cat([before.marks, marks], 1)
        if before is None:
            real = call.mask.queries
            self._counts[layer] = (
                int(fresh.sum()),
                fresh.numel() if real is None else int(real.sum()),
            )
        self._layers[layer] = _Layer(fresh, marks, dims)
        return fresh

    def _dims(self, call: AttentionCall, size: torch.Tensor) -> torch.Tensor:
        """(batch, d_model) bool."""
        if self.dims is not None:
            dims = named_dims(size, self.dims)
            if self.named:
                return dims
        else:
            starts = call.mask.starts
            first = torch.zeros(len(size), dtype=torch.long) if starts is None else starts
            dims = sink_dims(size, first, self.tau)
        image = call.images
        if image is not None and image.shape != size.shape[:2]:
            image = None
        return dims & ~shared_dims(size, self.tau, call.mask.queries, image)

    def _before(self, call: AttentionCall) -> _Layer:
        """What was remembered of the tokens before the call's, a row for each of its samples."""
        assert call.key is not None
        layer, start, first = (
            self._layers.get(call.site.layer),
            call.mask.q_start,
            call.mask.k_start,
        )
        if layer is not None and layer.sinks.shape[1] >= start:
            old = call.key[:, 0, : start - first, 0]  # (rows, slots first … start)
            new = layer.marks[:, first:start]
            same = torch.stack([(row == new).all(-1) for row in old])  # (rows, rows remembered)
            if bool(same.any(1).all()):
                order = same.int().argmax(1)
                return _Layer(
                    layer.sinks[order, :start], layer.marks[order, :start], layer.dims[order]
                )
        raise EditError(
            "var finds sinks while the prompt is read, and this text is not the one "
            "that was read last in "
            "its block; read the prompt there too, or give text_sinks= and "
            "visual_sinks=."
        )
