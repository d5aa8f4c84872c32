"""The attentions of a model as sites, by either tap, and the blocks that they stand in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from interp_hooks.call import Site
from interp_hooks.huggingface import own_attention
from interp_hooks.huggingface.discovery import (
    Found,
    attempt,
    interface_calls,
    refuse_bridged,
    sites,
)
from interp_hooks.huggingface.layout import Layout


def found_sites(
    module: Any,
    run: Callable[[], Any],
    layout: Layout,
    own: bool,
    sample: Mapping[str, torch.Tensor],
    plain: bool,
) -> list[tuple[Site, Found]]:
    """The model's attentions, by running it. Raises `TapError`."""
    refuse_bridged(module)
    if own:
        batch = next((len(t) for t in sample.values() if isinstance(t, torch.Tensor)), 1)
        calls = attempt(module, lambda: own_attention.discover(module, run, layout, batch, plain))
    else:
        calls = attempt(module, lambda: interface_calls(module, run, layout))
    return sites(module, calls, layout)


def block_path(site: Site, among: Sequence[Site]) -> str:
    """The path up to the number that counts the blocks, the first that tells the sites `among`
    apart: "model.layers.3" of "model.layers.3.self_attn", "decoder.block.0" of
    "decoder.block.0.layer.0.SelfAttention"; "" without a number."""
    paths = [_prefixes(s.path) for s in among]
    mine = _prefixes(site.path)
    for n in range(len(mine)):
        ends = [p[min(n, len(p) - 1)] if p else "" for p in paths]
        if len(set(ends)) == len(ends):
            return mine[n]
    return mine[-1] if mine else ""


def _prefixes(path: str) -> list[str]:
    """The beginnings of a path that end with a number, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
