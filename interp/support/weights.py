"""Digests of a model: every number of every tensor, and the settings that its modules hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from interp.support.fingerprint import fingerprint
from interp.support.tensor_digest import tensor_digest

if TYPE_CHECKING:
    import torch

#: attributes of modules that say where a model lies or how its attention is called, not what it is
PLACES = {"name_or_path"}
#: the same of a config
CONFIG_PLACES = {
    *("_name_or_path", "name_or_path", "transformers_version", "_commit_hash"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_internal"),
    *("_attn_implementation_autoset", "output_attentions", "_output_attentions"),
}
#: private attributes of modules that change what they compute (PEFT's)
PRIVATE = {"_disable_adapters", "_active_adapter", "_caller"}


def weights_hash(module: torch.nn.Module) -> str:
    """Digest (32 hex digits) of names, shapes, types and values of all parameters and buffers.

    Every number is read, see `tensor_digest`: another head of any layer gives another digest.

    Raises:
        ModelError: a tensor that has no values here ("meta") and no place that they are kept.
    """
    digest = hashlib.sha256()
    known: dict[Any, bytes] = {}  # tied tensors are read once
    for name, tensor in sorted(_tensors(module), key=lambda item: item[0]):
        key = _place(tensor)
        if key is None or key not in known:
            held = _offloaded(module, name, tensor)
            known[key] = tensor_digest(held) if _is_tensor(held) else fingerprint(held).encode()
        digest.update(f"{name}\0".encode() + known[key])
    return digest.hexdigest()[:32]


def state_hash(module: torch.nn.Module) -> str:
    """Digest of what a model computes beside its weights: config, modules' classes and settings
    (training mode, scales, active adapters), forwards that were replaced, and hooks by their code.
    """
    config: Any = getattr(module, "config", None) or getattr(module, "cfg", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    said = {k: v for k, v in values.items() if k not in CONFIG_PLACES}
    return fingerprint(_simple(said), [_settings(name, m) for name, m in module.named_modules()])


def _settings(name: str, module: torch.nn.Module) -> tuple[Any, ...]:
    held = {
        key: value
        for key, value in vars(module).items()
        if key in PRIVATE or (key[0] != "_" and key not in PLACES)
    }
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks += [vars(module)[key] for key in ("forward",) if key in vars(module)]
    kind = type(module)
    where = f"{kind.__module__}.{kind.__qualname__}"
    return name, where, _simple(held), [_hook(hook) for hook in hooks]


def _hook(hook: Any) -> list[Any]:
    """A hook's code and the tensors and fractions that it holds; whole numbers count its calls."""
    function = getattr(hook, "__func__", getattr(hook, "func", hook))
    held = dict(getattr(getattr(hook, "__self__", None), "__dict__", {}))
    code = getattr(function, "__code__", None)
    if code is not None:
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # a cell that is not filled yet
                held[name] = cell.cell_contents
    held |= dict(enumerate(getattr(hook, "args", ()))) | dict(getattr(hook, "keywords", {}))
    values = {
        str(k): v
        for k, v in held.items()
        if _is_tensor(v) or isinstance(v, float | str) or type(v).__module__ == "numpy"
    }
    kind = type(hook)
    said = getattr(function, "__qualname__", f"{kind.__module__}.{kind.__qualname__}")
    return [said, code, values]


def _simple(value: Any) -> Any:
    """Numbers and text, and containers of them; other values by their type."""
    if isinstance(value, dict):
        return {str(k): _simple(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        members = [_simple(v) for v in value]
        return members if isinstance(value, list | tuple) else sorted(members, key=str)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of all that a state dict holds, and of the buffers that it leaves out."""
    state = module.state_dict()
    yield from state.items()
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if name not in state:
            yield name, buffer


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _place(value: Any) -> Any:
    """Where a plain tensor's numbers are, with how they are read; None where that can't be told."""
    import torch

    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
    if not plain or value.device.type == "meta" or not value.numel():
        return None
    return (
        *(str(value.device), value.data_ptr(), str(value.dtype)),
        *(tuple(value.shape), value.stride()),
    )


def _offloaded(module: torch.nn.Module, name: str, value: Any) -> Any:
    """The values of a tensor that accelerate keeps elsewhere (offload to memory or disk); other
    values as they are."""
    if not _is_tensor(value) or value.device.type != "meta":
        return value
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        try:
            owner = module.get_submodule(".".join(parts[:depth]))
        except AttributeError:
            continue
        outer = getattr(owner, "_hf_hook", None)
        for hook in (outer, *getattr(outer, "hooks", ())):
            kept = getattr(hook, "weights_map", None)
            if kept is not None:
                try:
                    return kept[".".join(parts[depth:])]
                except KeyError:
                    continue
    return value
