"""Queries, keys and values as they leave the projections, by head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from interp_hooks.activations import Hook
from interp_hooks.call import Site
from interp_hooks.errors import TapError
from interp_hooks.huggingface.linear_map import alone
from interp_hooks.huggingface.proof import Part
from interp_hooks.huggingface.shards import made_whole, own_made


def outputs(
    site: Site, parts: Mapping[str, Part | str]
) -> list[tuple[torch.nn.Module, dict[str, Part]]]:
    """[(projection, place → its part in it)] of an attention.

    Raises `TapError` for projections not known here.
    """
    by_module: dict[torch.nn.Module, dict[str, Part]] = {}
    for place in "qkv":
        part = parts.get(place, "it was not seen")
        if isinstance(part, str):
            raise TapError(
                f"The query, key and value projections of layer {site.layer} are not known to this "
                f"toolkit: {part}; name them with layout=."
            )
        by_module.setdefault(part.projection, {})[place] = part
    return list(by_module.items())


@contextmanager
def projecting(
    attentions: Iterable[tuple[Site, Mapping[str, Part | str]]], hook: Hook
) -> Iterator[None]:
    """Let `hook(place, layer, (batch, tokens, heads, d))` look at and replace what the projections
    give, in the units of the attention call (times a `factor` that the model puts on later)."""

    def at(layer: int, parts: Mapping[str, Part]) -> Callable[..., Any]:
        def watch(module: torch.nn.Module, args: tuple, own: torch.Tensor) -> torch.Tensor | None:
            changed = None
            if alone.get():
                return None
            output = made_whole(module, own)
            for place, part in parts.items():
                numbers, factor = part.numbers, part.factor
                value = output[..., numbers.to(output.device)]
                new = hook(place, layer, value if factor == 1 else value * factor)
                if new is not None:
                    changed = output.clone() if changed is None else changed
                    new = new if factor == 1 else new / factor
                    changed[..., numbers.flatten().to(output.device)] = new.flatten(-2).to(changed)
            return None if changed is None else own_made(module, changed, own)

        return watch

    with ExitStack() as stack:
        for site, made in attentions:
            for projection, parts in outputs(site, made):
                stack.callback(projection.register_forward_hook(at(site.layer, parts)).remove)
        yield
