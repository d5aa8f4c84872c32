"""Queries, keys and values as they leave the projections, by head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from interp_hooks.activations import Hook
from interp_hooks.call import Site
from interp_hooks.errors import TapError
from interp_hooks.huggingface.layout import Layout


def outputs(
    module: torch.nn.Module, site: Site, layout: Layout
) -> list[tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """[(projection, place → (heads, d) numbers of its outputs)] of an attention module.

    Raises `TapError` for projections not known here.
    """
    heads = {"q": site.n_heads, "k": site.n_kv_heads, "v": site.n_kv_heads}
    separate = [layout.find(module, what) for what in ("query", "key", "value")]
    if all(projection is not None for projection in separate):
        return [
            (
                projection,
                {place: _own(torch.arange(_width(projection)).reshape(n, -1), place, site)},
            )
            for projection, (place, n) in zip(separate, heads.items(), strict=True)
            if projection is not None
        ]
    if (fused := layout.find(module, "fused")) is not None:
        width = _width(fused)
        q, k = site.n_heads * site.d_head, site.n_kv_heads * site.d_head
        parts = torch.arange(width).split([q, k, width - q - k])
        sizes = zip(parts, heads.items(), strict=True)
        return [(fused, {place: part.reshape(n, -1) for part, (place, n) in sizes})]
    fused = layout.find(module, "interleaved")
    if fused is not None and site.n_heads == site.n_kv_heads:
        numbers = torch.arange(_width(fused)).reshape(site.n_heads, 3, site.d_head)
        return [(fused, {place: numbers[:, i] for i, place in enumerate(heads)})]
    raise TapError(
        f"The query, key and value projections of {type(module).__name__} are not known to this "
        "toolkit; name them with layout=."
    )


def _own(numbers: torch.Tensor, place: str, site: Site) -> torch.Tensor:
    """The outputs that are queries: each head's first half where the projection makes the output
    gate as well (Qwen3-Next)."""
    gated = place == "q" and site.output_gate and numbers.shape[1] == 2 * site.d_head
    return numbers[:, : site.d_head] if gated else numbers


def _width(projection: Any) -> int:
    """Outputs of a Linear, or of a GPT-2 Conv1D, which stores its weight transposed."""
    return projection.weight.shape[1 if type(projection).__name__ == "Conv1D" else 0]


@contextmanager
def projecting(
    attentions: Iterable[tuple[Site, torch.nn.Module]], hook: Hook, layout: Layout
) -> Iterator[None]:
    """Let `hook(place, layer, (batch, tokens, heads, d))` look at and replace what the projections
    give."""

    def at(layer: int, parts: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
        def watch(
            module: torch.nn.Module, args: tuple, output: torch.Tensor
        ) -> torch.Tensor | None:
            changed = None
            for place, numbers in parts.items():
                new = hook(place, layer, output[..., numbers.to(output.device)])
                if new is not None:
                    changed = output.clone() if changed is None else changed
                    changed[..., numbers.flatten().to(output.device)] = new.flatten(-2).to(changed)
            return changed

        return watch

    with ExitStack() as stack:
        for site, module in attentions:
            for projection, parts in outputs(module, site, layout):
                stack.callback(projection.register_forward_hook(at(site.layer, parts)).remove)
        yield
