"""The second tap: models that compute attention themselves, not by transformers' interface.

Each module in which a softmax attention is recognised (`traced`) runs its forward under a `Trace`
while a block lasts; the call is handed to the tap as any other, with the bias between q kᵀ and the
softmax as a dense mask, and z goes where the module's own would have gone. Logits are there as the
module makes them, so memory is O(queries × keys).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.engine import Tap, attend
from interp_hooks.errors import TapError
from interp_hooks.huggingface.called import ModuleStack
from interp_hooks.huggingface.discovery import Found
from interp_hooks.huggingface.layout import Layout
from interp_hooks.huggingface.output_gate import Probe
from interp_hooks.huggingface.own_calls import RealTokens, are_streams, call_of, head_counts
from interp_hooks.huggingface.tap import OTHER_HANDLE, OTHER_THREAD, configs_of, weights_wanted
from interp_hooks.huggingface.traced import Attention, Trace
from interp_hooks.own_methods import wrapped

#: largest difference of the recovered weights from the module's own softmax
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@contextmanager
def eager(model: Any, plain: bool) -> Iterator[None]:
    """The model chooses its plain attention, if it is to, until the block ends."""
    configs = configs_of(model) if plain else {}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


# What is traced now: id of a module → its site, who answers, the thread of the block. Filled on
# entry of a block, emptied on exit.
_LIVE: dict[int, tuple[Site, Callable[[AttentionCall], torch.Tensor], int]] = {}


@contextmanager
def installed(
    model: Any,
    live: Mapping[int, tuple[Site, Callable[[AttentionCall], torch.Tensor]]],
    over: bool = False,
    plain: bool = True,
    streams: Mapping[int, Site] | None = None,
) -> Iterator[None]:
    """Route what the modules of `live` (by id) compute as attention through its handlers until the
    block ends.

    Args:
        model: whose attention.
        live: id of a module → its site, and who answers its calls.
        over: whether modules that are tapped already may be taken over for the time being.
        plain: whether the model is made to choose its plain attention.
        streams: id of a module → the site of its streams beside the main one.

    Raises:
        TapError: another handle has a block open on some of the modules.
    """
    outer = {key: _LIVE[key] for key in live if key in _LIVE}
    if outer and not over:
        raise TapError(OTHER_HANDLE)
    real = RealTokens(model)
    thread = threading.get_ident()
    _LIVE.update({key: (*one, thread) for key, one in live.items()})
    try:
        with eager(model, plain), ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(real, with_kwargs=True).remove)
            for module in model.modules():
                if id(module) in live and id(module) not in outer:
                    stack.enter_context(_tracing(module, real, (streams or {}).get(id(module))))
            yield
    finally:
        for key in live:
            _LIVE.pop(key, None)
        _LIVE.update(outer)


@contextmanager
def _tracing(module: torch.nn.Module, real: RealTokens, streams: Site | None) -> Iterator[None]:
    """The module's forward runs under a `Trace` while the block lasts. `streams`: the site of what
    it attends with beside its main stream."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        site, handler, thread = _LIVE[id(module)]
        if thread != threading.get_ident():
            raise TapError(OTHER_THREAD)
        seen: list[Attention] = []

        def swap(attention: Attention) -> torch.Tensor:
            beside = bool(seen)
            if beside and (len(seen) > 1 or streams is None or not are_streams(attention, seen[0])):
                raise TapError(_several(module))
            seen.append(attention)
            here = streams if beside and streams is not None else site
            call, fold = call_of(attention, module, here, 1, real, beside)
            weights: list[torch.Tensor] = []
            if attention.shown and weights_wanted({"output_attentions": real.attentions}):
                call = replace(call, weights=weights.append)
            z = handler(call)
            for own_weights in attention.shown if weights else ():
                new = fold.unfold(weights[-1])
                own_weights.copy_(new.reshape(own_weights.shape))  # what the module hands on
            return _given_back(z, fold, attention)

        with Trace(swap) as trace:
            out = own(*args, **kwargs)
        if not seen:
            raise TapError(
                f"{type(module).__name__} (layer {site.layer}) computed no attention that the tap "
                "recognises with these inputs"
                + (f": its logits went through {trace.lost}." if trace.lost else ".")
            )
        return out

    with wrapped(module, "forward", forward):
        yield


def _several(module: torch.nn.Module) -> str:
    return (
        f"{type(module).__name__} computes several attentions in one forward, so that its heads "
        "can't be told apart and the model can't be tapped."
    )


def _given_back(z: torch.Tensor, fold: Any, attention: Attention) -> torch.Tensor:
    """z (batch, queries, heads, d) as the module's own product would be."""
    return fold.unfold(z.transpose(1, 2)).to(attention.v.dtype).contiguous()


def discover(
    model: Any, run: Callable[[], Any], layout: Layout, batch: int, plain: bool = True
) -> list[Found]:
    """Every attention that is recognised while `run` runs the model, in order of calls, computed
    plainly. Raises `TapError`."""
    Key = tuple[int, int, int]  # module, turn, stream
    found: dict[Key, Found] = {}
    given: dict[Key, tuple[torch.Tensor, int]] = {}  # z as it was given back, and when
    seen: dict[tuple[int, int], list[Attention]] = {}  # of this forward
    probe, stack, real = Probe(layout), ModuleStack(model), RealTokens(model)

    def swap(attention: Attention) -> torch.Tensor | None:
        module = _owner(attention)
        if attention.q.shape[-2] == 1 and not head_counts(module):
            return None  # a token chooses among its own states, it does not see other tokens
        turn = stack.turn(module)
        before = seen.setdefault((id(module), turn), [])
        if len(before) > 1 or (before and not are_streams(attention, before[0])):
            raise TapError(_several(module))
        before.append(attention)
        stream = len(before) - 1
        call, fold = call_of(attention, module, None, batch, real, bool(stream))
        _prove(
            module, call, fold.fold(attention.weights) if attention.weights is not None else None
        )
        key = id(module), turn, stream
        found.setdefault(key, Found(stack.path(module), module, call, turn, stream=stream))
        z = attend(call, Tap())
        if not stream:
            z = probe.attended(module, z, turn)
        back = _given_back(z, fold, attention)
        given.setdefault(key, (back, back._version))
        return back

    with eager(model, plain), probe, stack, ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(real, with_kwargs=True).remove)
        with Trace(swap, lambda: stack.running) as trace:
            run()
        if not found:
            raise TapError(
                f"No attention is recognised in {type(model).__name__}"
                + (f": its logits go through {trace.lost}" if trace.lost else "")
                + ", so it can't be tapped."
            )
        if probe.again():
            stack.restart()
            seen.clear()
            with Trace(swap, lambda: stack.running):
                run()
    for key, f in found.items():
        if not f.stream:
            found[key] = f = replace(f, between=probe.between(f.module, f.turn))
        back, version = given[key]
        if f.between is None and back._version != version:
            raise TapError(
                f"{type(f.module).__name__} changes its heads' outputs in place after attention (a "
                "convolution of the values, say), so they are not what its output projection "
                "reads and the model can't be tapped."
            )
    return list(found.values())


def _owner(attention: Attention) -> torch.nn.Module:
    """The innermost module with parameters in whose forward all operations were called."""
    common: list[torch.nn.Module] = []
    for modules in zip(*attention.places, strict=False):
        if any(m is not modules[0] for m in modules):
            break
        common.append(modules[0])
    while len(common) > 1 and next(common[-1].parameters(), None) is None:
        common.pop()
    if not common:
        raise TapError("A softmax attention is computed outside the model's modules.")
    return common[-1]


def _prove(module: torch.nn.Module, call: AttentionCall, weights: torch.Tensor | None) -> None:
    """Raise `TapError` unless softmax(scaling · q kᵀ + bias) of the call is what the module's own
    softmax gave, (batch, heads, queries, keys)."""
    if weights is None:
        return
    assert call.query is not None and call.key is not None
    every = call.query.shape[1] // call.key.shape[1]
    q, k = call.query.double(), call.key.double().repeat_interleave(every, 1)
    logits = call.scaling * (q @ k.transpose(-1, -2))
    dense = call.mask.dense
    if dense is not None and dense.dtype == torch.bool:
        logits = logits.masked_fill(~dense, -torch.inf)
    elif dense is not None:
        logits = logits + dense
    seen = torch.isfinite(logits).any(-1, keepdim=True)  # padding may see nothing
    if call.sinks is not None:
        sinks = call.sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], -1)
    own = logits.softmax(-1)[..., : weights.shape[-1]]
    error = (own - weights.double()).masked_fill(~seen, 0).abs().max()
    if not float(error) <= TOLERANCE.get(weights.dtype, 2e-2):
        raise TapError(
            f"The attention weights recovered from {type(module).__name__} differ from its own by "
            f"{float(error):.1e}, so the model can't be tapped."
        )
