"""The tap on HuggingFace models: one registered attention function, installed only inside our
blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.engine import Tap, attend
from interp_hooks.errors import TapError
from interp_hooks.head_shards import HeadShards
from interp_hooks.held_keys import unwrapped
from interp_hooks.huggingface.masks import describe, read
from interp_hooks.huggingface.shards import is_shared, shards_of

#: The registered name. It must not contain "flash", "sdpa", "flex_attention" or "/": transformers
#: looks for those.
NAME = "interp_tap"


class _Name(str):
    """`NAME` in a config, which copies of the config don't have: they say what it said before."""

    before: Any

    def __deepcopy__(self, memo: Any) -> Any:
        return self.before


@dataclass(frozen=True)
class _Live:
    """A tapped attention module: its site (None while sites are looked for), who answers its calls,
    the thread whose block it is, and whether processes share its matrices out."""

    site: Site | None
    handler: Callable[..., torch.Tensor]
    thread: int
    shared: bool


@dataclass
class _Routed:
    """A config whose models are routed through the tap: what it said before, by how many blocks,
    and of which thread (two models may share one config)."""

    config: Any
    before: Any
    blocks: int
    thread: int


# What is tapped now. Filled on entry of a block, emptied on exit.
_LIVE: dict[int, _Live] = {}
_ROUTED: dict[int, _Routed] = {}
_ROOTS: list[Any] = []
_LOCK = threading.RLock()


def _tap(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function: builds the call, lets the handler answer with z (batch, queries,
    heads, d); with it the weights (batch, heads, queries, keys) where the caller asks for them."""
    live = _LIVE.get(id(module))
    if live is None and _inside(module):
        raise TapError(
            f"An attention module of type {type(module).__name__} is not part of the tapped model "
            "(was it replaced or "
            "copied after loading?); load the model again."
        )
    if live is not None and not _own_thread(live.thread):
        raise TapError(OTHER_THREAD)
    if dropout:
        raise TapError(
            "The model is in training mode with attention dropout; call model.module.eval() first."
        )
    site = live.site if live is not None else None
    key, holder = unwrapped(key)
    n_keys = key.shape[2] if holder is None else holder.seen
    mask = read(attention_mask, module, query.shape[2], n_keys, kwargs)
    bias = kwargs.get("position_bias")
    if bias is not None:
        mask = replace(mask, dense=_with_bias(mask, bias, query, key))
    weights: list[torch.Tensor] = []
    shards = shards_of(module, query, value) if live is not None and live.shared else None
    call = AttentionCall(
        site if site is not None else _provisional(module, query, key, shards),
        query,
        key,
        value,
        mask,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
        weights=weights.append if weights_wanted(kwargs) else None,
        positions=_positions(kwargs.get("position_ids"), query.shape[2]),
        holder=holder,
        shards=shards,
    )
    if live is None:  # another model, which only shares its config with a tapped one
        z = attend(call, Tap())
    elif site is None:
        z = live.handler(module, call)
    else:
        z = live.handler(call)
    # some architectures view it instead of reshaping it (AFMoE)
    return z.contiguous(), weights[-1] if weights else None


def _positions(given: Any, queries: int) -> torch.Tensor | None:
    """(batch or 1, queries): the position ids that an attention was given; None for none, and for
    those of several axes (pictures)."""
    if not isinstance(given, torch.Tensor) or given.ndim != 2 or given.shape[1] != queries:
        return None
    return given


def _own_thread(thread: int) -> bool:
    """Whether it is the thread at hand; a graph is compiled where its block is."""
    return torch.compiler.is_compiling() or thread == threading.get_ident()


def _inside(module: torch.nn.Module) -> bool:
    """Whether an attention is of a model that is tapped, or a replica of one (DataParallel)."""
    replica = getattr(module, "_is_replica", False)
    return replica or any(part is module for root in _ROOTS for part in root.modules())


OTHER_THREAD = (
    "This model ran in one thread while another has a block open on it: attention can be observed "
    "or edited by one thread at a time, so open the block in the thread that runs the model, let "
    "the threads take turns, or give each a copy (copy.deepcopy(model.module))."
)


OTHER_HANDLE = (
    "Some of these layers are in the block of another handle, which numbers or names them "
    "otherwise; use that handle, or leave its block first."
)


def _masked(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The mask function: `describe`, in the thread of the block only."""
    routed = _ROUTED.get(id(kwargs.get("config")))
    if routed is not None and not _own_thread(routed.thread):
        raise TapError(OTHER_THREAD)
    return describe(*args, **kwargs)


def weights_wanted(kwargs: Mapping[str, Any]) -> bool:
    """Whether the attention call is to hand over its weights (`output_attentions=True`)."""
    if kwargs.get("output_attentions"):
        return True
    try:  # transformers collects them by hooks, and tells these by a context variable
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    wanted = _active_collector.get()
    return wanted is not None and any(name.endswith("attentions") for name in wanted)


def check_attentions(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Raise `TapError` where output_attentions=True was asked for and the model gives none."""
    if kwargs.get("output_attentions") and isinstance(output, Mapping):
        given = [v for k, v in output.items() if k.endswith("attentions") and v is not None]
        if not any(isinstance(a, torch.Tensor) for v in given for a in v):
            raise TapError(
                f"{type(module).__name__} hands over no attentions inside a block; leave the block "
                "for output_attentions=True, or use model.observe(...)."
            )


def _with_bias(mask, bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A 4-D float bias that also holds the mask's own 4-D part."""
    bias = bias[..., -query.shape[2] :, : key.shape[2]].float()
    if mask.dense is None:
        return bias
    own = mask.dense
    return torch.where(own, bias, -torch.inf) if own.dtype == torch.bool else bias + own


def _provisional(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, shards: HeadShards | None
) -> Site:
    layer = getattr(module, "layer_idx", None)
    processes = 1 if shards is None else shards.size
    return Site(
        "",
        -1 if layer is None else layer,
        "self",
        "",
        query.shape[1] * processes,
        key.shape[1] * processes,
        query.shape[-1],
    )


def configs_of(model: Any) -> dict[int, Any]:
    """Every config object that chooses an attention implementation, by id."""
    by_id, queue = {}, [model.config]
    queue += [
        m.config
        for m in model.modules()
        if hasattr(m, "config") and hasattr(m.config, "sub_configs")
    ]
    while queue:
        config = queue.pop()
        if id(config) in by_id or not hasattr(config, "_attn_implementation"):
            continue
        by_id[id(config)] = config
        queue += [
            s
            for k in getattr(config, "sub_configs", {})
            if (s := getattr(config, k, None)) is not None
        ]
    return by_id


@contextmanager
def installed(
    model: Any,
    live: Mapping[int, tuple[Site | None, Callable[..., torch.Tensor]]],
    over: bool = False,
) -> Iterator[None]:
    """Route the model's attention through `_tap` until the block ends, then put everything back as
    it was.

    Args:
        model: whose attention.
        live: id of an attention module → its site, and who answers its calls.
        over: whether modules that are tapped already may be taken over for the time being.

    Raises:
        TapError: another handle has a block open on some of the modules.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _tap)
    AttentionMaskInterface.register(NAME, _masked)
    thread = threading.get_ident()
    with _LOCK:
        outer = {key: _LIVE[key] for key in live if key in _LIVE}
        if outer and not over:
            raise TapError(OTHER_HANDLE)
        configs = configs_of(model)
        for key, config in configs.items():
            before = config._attn_implementation_internal
            routed = _ROUTED.setdefault(key, _Routed(config, before, 0, thread))
            routed.blocks += 1
            name = config._attn_implementation_internal = _Name(NAME)
            name.before = routed.before
        _ROOTS.append(model)
        shared = {id(part) for part in model.modules() if is_shared(part)}
        _LIVE.update({key: _Live(*one, thread, key in shared) for key, one in live.items()})
    try:
        yield
    finally:
        with _LOCK:
            for key in configs:
                routed = _ROUTED[key]
                routed.blocks -= 1
                if not routed.blocks:
                    del _ROUTED[key]
                    routed.config._attn_implementation_internal = routed.before
            for key in live:
                _LIVE.pop(key, None)
            _LIVE.update(outer)
            del _ROOTS[max(i for i, root in enumerate(_ROOTS) if root is model)]
