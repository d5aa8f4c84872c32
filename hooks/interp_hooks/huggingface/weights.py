"""Per-head weights of a HuggingFace attention, from its proved projections. GQA mapped to query
heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from interp_hooks.call import Site
from interp_hooks.errors import TapError
from interp_hooks.head_weights import HeadWeights
from interp_hooks.huggingface.linear_map import linear_map
from interp_hooks.huggingface.proof import Part, WrongLayout

MATRICES = {"q": "W_Q", "k": "W_K", "v": "W_V", "z": "W_O"}
#: (heads, d_model, d) and (heads, d), what stands for q, k or v
ByHead = tuple[torch.Tensor, torch.Tensor | None]


def head_weights(site: Site, parts: Mapping[str, Part | ByHead | str]) -> HeadWeights:
    """`HeadWeights` of a site by what makes q, k, v and reads z.

    What is no matrix is refused when it is asked for; raises `TapError` where nothing is one, or
    the user's layout is contradicted.
    """
    for part in parts.values():
        if isinstance(part, WrongLayout):
            raise TapError(f"Head weights of {site.place} are refused: {part}.")
    refused: dict[str, str] = {}
    by_head: dict[str, ByHead] = {}
    maps: dict[Any, ByHead] = {}  # a fused projection is read once
    for place, matrix in MATRICES.items():
        part = parts[place]
        try:
            if isinstance(part, str):
                raise TapError(part)
            by_head[place] = _by_head(site, place, part, maps)
        except TapError as reason:
            refused[matrix] = f"{matrix} of {site.place} is refused: {reason}."
    if len(refused) == len(MATRICES):
        first = next(iter(refused.values())).partition(": ")[2]
        raise TapError(f"Head weights of {site.place} are refused: {first}")
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = (
        by_head.get(place, (None, None)) for place in MATRICES
    )
    normed = frozenset(p for p, part in parts.items() if isinstance(part, Part) and part.normed)
    return HeadWeights(wq, wk, wv, wo, bq, bk, bv, bo, normed, refused)  # type: ignore[arg-type]


def _by_head(site: Site, place: str, part: Any, maps: dict[Any, ByHead]) -> ByHead:
    """One place's matrix and bias by query head. Raises `TapError` for what is not linear."""
    if not isinstance(part, Part):
        weight, bias = part
        repeat = site.n_heads // len(weight)
        return weight.repeat_interleave(repeat, 0), (
            None if bias is None else bias.repeat_interleave(repeat, 0)
        )
    if part.projection not in maps:
        maps[part.projection] = linear_map(part.projection, part.like)
    weight, bias = maps[part.projection]
    if place == "z":
        return weight.T.reshape(site.n_heads, -1, weight.shape[0]), bias
    rows = part.numbers.to(weight.device)
    rows = rows.repeat_interleave(site.n_heads // len(rows), 0)
    heads = weight[rows].transpose(1, 2).contiguous()  # (heads, d_model, d)
    bias = None if bias is None else bias[rows]
    if part.factor != 1:
        heads, bias = heads * part.factor, None if bias is None else bias * part.factor
    return heads, bias
