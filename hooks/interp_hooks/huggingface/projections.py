"""Queries, keys and values as they leave the projections, by head; and forwards that leave blocks
out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from interp_hooks.activations import Rewrite
from interp_hooks.call import Site
from interp_hooks.errors import TapError

FUSED = ("c_attn", "qkv_proj", "Wqkv")


def outputs(
    module: torch.nn.Module, site: Site
) -> list[tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """[(projection, place → (heads, d) numbers of its outputs)] of an attention module.

    Raises `TapError` for projections not known here.
    """
    heads = {"q": site.n_heads, "k": site.n_kv_heads, "v": site.n_kv_heads}
    if all(hasattr(module, f"{place}_proj") for place in heads):
        return [
            (projection, {place: torch.arange(projection.weight.shape[0]).reshape(n, -1)})
            for place, n in heads.items()
            for projection in [getattr(module, f"{place}_proj")]
        ]
    for name in FUSED:
        if (fused := getattr(module, name, None)) is not None:
            width = fused.weight.shape[1 if type(fused).__name__ == "Conv1D" else 0]
            q, k = site.n_heads * site.d_head, site.n_kv_heads * site.d_head
            parts = torch.arange(width).split([q, k, width - q - k])
            return [
                (
                    fused,
                    {
                        p: part.reshape(n, -1)
                        for part, (p, n) in zip(parts, heads.items(), strict=True)
                    },
                )
            ]
    if (
        fused := getattr(module, "query_key_value", None)
    ) is not None and site.n_heads == site.n_kv_heads:
        numbers = torch.arange(fused.weight.shape[0]).reshape(
            site.n_heads, 3, site.d_head
        )  # head by head: q, k, v
        return [(fused, {place: numbers[:, i] for i, place in enumerate(heads)})]
    raise TapError(
        f"The query, key and value projections of {type(module).__name__} are not known to this "
        "toolkit."
    )


@contextmanager
def projecting(attentions: Iterable[tuple[Site, torch.nn.Module]], see: Rewrite) -> Iterator[None]:
    """Let `see(place, layer, (batch, tokens, heads, d))` look at and replace what the projections
    give."""

    def at(layer: int, parts: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            changed = None
            for place, numbers in parts.items():
                new = see(place, layer, output[..., numbers.to(output.device)])
                if new is not None:
                    changed = output.clone() if changed is None else changed
                    changed[..., numbers.flatten().to(output.device)] = new.flatten(-2).to(changed)
            return changed

        return hook

    with ExitStack() as stack:
        for site, module in attentions:
            for projection, parts in outputs(module, site):
                stack.callback(projection.register_forward_hook(at(site.layer, parts)).remove)
        yield


@contextmanager
def skipping(blocks: Mapping[int, torch.nn.Module], before: int, output: Any) -> Iterator[None]:
    """The blocks before layer `before` don't run; each returns `output` at once, what the last of
    them gave."""
    left_out = [block for layer, block in blocks.items() if layer < before]
    own = [block.__dict__.get("forward") for block in left_out]
    try:
        for block in left_out:
            block.__dict__["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for block, forward in zip(left_out, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward
