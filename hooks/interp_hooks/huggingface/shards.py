"""Tensor parallelism of transformers (`tp_plan`): which modules of a model are shared out over
processes, and what they read and give as a whole."""

from __future__ import annotations

import sys
from typing import Any

import torch

from interp_hooks.errors import TapError
from interp_hooks.head_shards import HeadShards

#: what transformers calls the dimension of its mesh
DIMENSION = "tp"


def sharded(module: Any) -> tuple[HeadShards, int] | None:
    """Over whom a linear layer's or table's matrix is shared out, and along which of its two
    dimensions (0: what it gives, 1: what it reads); None where it is whole."""
    weight = getattr(module, "weight", None)
    kinds = sys.modules.get("torch.distributed.tensor")
    if kinds is None or not isinstance(weight, kinds.DTensor):
        return None
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    if DIMENSION not in names:
        return None
    placement = weight.placements[names.index(DIMENSION)]
    if mesh[DIMENSION].size() == 1 or not isinstance(placement, kinds.Shard):
        return None
    shards = HeadShards(
        mesh.get_group(DIMENSION), mesh[DIMENSION].size(), mesh.get_local_rank(DIMENSION)
    )
    return shards, placement.dim % weight.ndim


def is_shared(module: torch.nn.Module) -> bool:
    """Whether processes share out a matrix of one of a module's children."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False  # blocks are opened often, and this is asked of every module
    return any(sharded(child) is not None for child in module.children())


def shards_of(
    attention: torch.nn.Module, query: torch.Tensor, value: torch.Tensor
) -> HeadShards | None:
    """Over which processes the heads of an attention call are shared out; None where each has all.

    Sharing a matrix out does not say so: a projection may gather what it gives (Phi-3's fused one).
    What reads z does: its matrix is as wide as the heads of all processes.

    Raises `TapError` where neither holds.
    """
    found = [(part, one) for part in attention.modules() if (one := sharded(part)) is not None]
    if not found:
        return None
    own = query.shape[1] * value.shape[-1]  # heads · d_head
    for part, (shards, dim) in found:
        weight: Any = part.weight
        width = weight.shape[1]
        if dim == 1 and width in (own, own * shards.size):
            return None if width == own else shards
    raise TapError(
        f"{type(attention).__name__} is shared out over processes in a way that is not understood "
        "here: nothing in it reads the heads of all. Load it in one process."
    )


def read_whole(module: Any, given: torch.Tensor) -> torch.Tensor:
    """What a module reads, of which this process may have a part."""
    found = sharded(module)
    part = found is not None and found[1] == 1 and given.shape[-1] < module.weight.shape[1]
    return found[0].whole(given, given.ndim - 1) if part and found is not None else given


def made_whole(module: Any, made: torch.Tensor) -> torch.Tensor:
    """What a module gives, of which this process may have a part."""
    found = sharded(module)
    part = found is not None and found[1] == 0 and made.shape[-1] < module.weight.shape[0]
    return found[0].whole(made, made.ndim - 1) if part and found is not None else made


def own_made(module: Any, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of what a module gives, as wide as `like`."""
    found = sharded(module)
    cut = found is not None and whole.shape[-1] != like.shape[-1]
    return found[0].own(whole, whole.ndim - 1) if cut and found is not None else whole


def whole_tensor(tensor: Any) -> Any:
    """A parameter as one tensor, gathered where processes share it out."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
