"""What a model's own eager attention says: patterns, W_O's inputs, and statistics in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp_hooks.call import Site


@dataclass
class Eager:
    """One untouched run: what the model gave, and the patterns of each site, a tensor a forward.

    Attributes:
        out: the model's output.
        patterns: site → [(batch, heads, queries, keys)] float64, one for each forward.
        reads: site → [(batch, queries, heads · d)], what W_O read, where that is known.
    """

    out: Any = None
    patterns: dict[Site, list[Tensor]] = field(default_factory=dict)
    reads: dict[Site, list[Tensor]] = field(default_factory=dict)


@contextmanager
def eagerly(module: Any) -> Iterator[None]:
    """The model with its eager attention until the block ends."""
    configs = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    queue = list(configs.values())
    while queue:
        config = queue.pop()
        for name in getattr(config, "sub_configs", None) or {}:
            part = getattr(config, name, None)
            if part is not None and id(part) not in configs:
                configs[id(part)] = part
                queue.append(part)
    named = {k: c for k, c in configs.items() if hasattr(c, "_attn_implementation_internal")}
    before = {k: c._attn_implementation_internal for k, c in named.items()}
    try:
        for config in named.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in named.items():
            config._attn_implementation_internal = before[key]


@contextmanager
def recorded(module: Any, sites: list[Site], output_of: Callable[[Site], Any]) -> Iterator[Eager]:
    """Patterns and W_O's inputs of the forwards in the block, by plain hooks."""
    eager = Eager({}, {s: [] for s in sites}, {s: [] for s in sites})
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)

    def note(mine: list[Site]) -> Callable[..., None]:
        # a module that stands for several layers answers for them in turn
        def hook(_: Any, args: Any, output: Any) -> None:
            heads = {s.n_heads for s in mine}
            weights = _pattern(output, heads)
            if weights is not None:
                site = min(mine, key=lambda s: len(eager.patterns[s]))
                eager.patterns[site].append(weights.detach().double())

        return hook

    def reading(mine: list[Site]) -> Callable[..., None]:
        def hook(_: Any, args: Any) -> None:
            site = min(mine, key=lambda s: len(eager.reads[s]))
            eager.reads[site].append(args[0].detach())

        return hook

    with ExitStack() as stack:
        for path, mine in by_path.items():
            hooked = module.get_submodule(path).register_forward_hook(note(mine))
            stack.callback(hooked.remove)
            projection = output_of(mine[0])
            if projection is not None:
                stack.callback(projection.register_forward_pre_hook(reading(mine)).remove)
        yield eager


def _pattern(output: Any, heads: set[int]) -> Tensor | None:
    """The attention weights among a module's outputs: (batch, heads, queries, keys), rows that sum
    to at most 1."""
    if not isinstance(output, (tuple, list)):
        return None
    for part in output[1:]:
        if isinstance(part, (tuple, list)):
            found = _pattern((None, *part), heads)
            if found is not None:
                return found
        if not isinstance(part, Tensor) or part.ndim != 4 or part.shape[1] not in heads:
            continue
        sums = part.sum(-1)
        # T5's position bias, all zeros in cross-attention, stands before the weights
        if part.is_floating_point() and float(part.min()) >= 0 and 0.01 < float(sums.max()) <= 1.01:
            return part
    return None


def with_attentions(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, asking for attention weights where the forward knows how."""
    if "output_attentions" in inspect.signature(module.forward).parameters:
        return {**inputs, "output_attentions": True}
    return inputs


def statistics(pattern: Tensor, apart: bool) -> dict[str, Tensor]:
    """Row statistics of A (batch, heads, queries, keys) by their definitions, in float64."""
    a = pattern.double()
    queries, keys = a.shape[-2:]
    stats = {
        # −Σ A ln A, in nats
        "entropy": -(a * torch.where(a > 0, a, 1).log()).sum(-1),
        "max": a.amax(-1),
        "key_mass": a.sum(-1),
    }
    if not apart:  # Σ A |q − k| in slots, where queries and keys are the same tokens
        at = torch.arange(queries)[:, None] + keys - queries
        stats["distance"] = (a * (at - torch.arange(keys)).abs()).sum(-1)
    return stats


def with_factor(pattern: Tensor, value: Tensor, read: Tensor) -> Tensor:
    """A times the factor f of each row with z = f · A·v, for models that put their sink logit in
    after the softmax and hand over weights without it (Granite SWA): f = ⟨z, A·v⟩ / ⟨A·v, A·v⟩,
    from `value` (batch, heads, keys, d) and what W_O read, (batch, queries, heads · d)."""
    plain = pattern @ value.double()  # (batch, heads, queries, d)
    z = read.double().unflatten(-1, (pattern.shape[1], -1)).transpose(1, 2)
    factor = (z * plain).sum(-1) / (plain * plain).sum(-1).clamp_min(1e-30)
    return pattern * factor[..., None]


def zero_tuned(pattern: Tensor, first: Tensor, gamma: float) -> Tensor:
    """a₀' = γ a₀ / D, a_i' = a_i / D, D = (γ − 1) a₀ + Σ a, for `first` (batch,) initial keys."""
    factor = torch.ones_like(pattern)
    rows = torch.arange(len(first))
    factor[rows, :, :, first] = gamma
    scaled = pattern * factor
    # a learned sink's share, 1 − Σ a, stays in the denominator
    total = scaled.sum(-1, keepdim=True) + (1 - pattern.sum(-1, keepdim=True)).clamp_min(0)
    return scaled / total.clamp_min(1e-30)


def act_sinks(pattern: Tensor, real: Tensor, alpha: float) -> Tensor:
    """(batch, heads, keys) bool, S = {k after the first real : c_k > α / N}, c_k the mean of
    A[q, k] over the real rows q that see k (those with any weight there)."""
    sees = (pattern > 0).any(1) & real[:, :, None]  # (batch, queries, keys)
    weights = torch.where(sees[:, None], pattern, 0)
    mean = weights.sum(-2) / sees.sum(-2)[:, None].clamp_min(1)
    later = torch.arange(pattern.shape[-1]) > real.int().argmax(-1)[:, None]
    return (mean > alpha / real.sum(-1)[:, None, None]) & later[:, None] & real[:, None]


def calibrated(pattern: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """ACT: a' = β a on S, a (1 + (1 − β) m / (Σ a − m)) elsewhere, m = Σ_S a."""
    inside = torch.where(sinks[:, :, None], pattern, 0)
    mass = inside.sum(-1, keepdim=True)
    rest = pattern.sum(-1, keepdim=True) - mass
    grown = pattern * (1 + (1 - beta) * mass / rest.clamp_min(1e-30))
    changed = torch.where(sinks[:, :, None], beta * pattern, grown)
    return torch.where(rest > 1e-30, changed, pattern)


class Untouched(Exception):
    """What the untouched model itself can't do."""


def leaves_sink_out(pattern: Tensor) -> bool:
    """Whether weights of a layer with a learned sink sum to 1."""
    return float((pattern.sum(-1) - 1).abs().median()) < 1e-4


def heads_read(pattern: Tensor, value: Tensor, like: Tensor) -> Tensor:
    """A'·v as W_O reads it."""
    return (pattern @ value).transpose(1, 2).flatten(-2).reshape(like.shape).to(like)


@contextmanager
def reading(projection: Any, z: Tensor, before: int = 0) -> Iterator[None]:
    """W_O reads z in the block, after so many forwards of its own (of shared layers)."""
    turn = iter(range(10**6))
    hooked = projection.register_forward_pre_hook(
        lambda _, args: (z, *args[1:]) if next(turn) == before else None
    )
    try:
        yield
    finally:
        hooked.remove()
