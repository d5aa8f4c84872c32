"""Models as people hold them: under PEFT, compiled, spread over devices, in training mode."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from interp_hooks.errors import TapError


def uncompiled(module: Any) -> Any:
    """The model inside `torch.compile(model)`: both hold the same modules."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def eagerly(certain: bool = False) -> Iterator[None]:
    """Compiled functions and modules run as they are written for the length of a block: compiled
    code keeps no hook that came after it, and would leave the tap out without a word.

    Nothing is done where nothing can have been compiled, unless that is `certain`.
    """
    if not certain and "torch._dynamo" not in sys.modules:
        yield
        return
    _EAGER.enter()
    try:
        yield
    finally:
        _EAGER.leave()


class _Eager:
    """The blocks that want compiled code to stand aside, counted.

    The stance is the process's, and blocks of two handles, or generators that Python closes when
    it likes, do not end in the order they began: were each to put back what it found, the last
    one could leave compiling off for good.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open = 0
        self.stance = ExitStack()

    def enter(self) -> None:
        with self.lock:
            if self.open == 0:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.open += 1

    def leave(self) -> None:
        with self.lock:
            self.open -= 1
            if self.open == 0:
                self.stance.close()


_EAGER = _Eager()


def inner(module: Any) -> Any:
    """The model of transformers itself, inside a PEFT model; its adapters are inside it in turn."""
    base = getattr(module, "get_base_model", None)
    if base is None or not hasattr(module, "peft_config"):
        return module
    return base()


def refuse_virtual_tokens(module: Any) -> None:
    """Raise `TapError` for a PEFT adapter that puts keys or tokens before the prompt's."""
    if not hasattr(module, "peft_config"):
        return
    config: Any = getattr(module, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
        raise TapError(
            f"The active adapter is of {kind}: its virtual tokens stand before the prompt's and "
            "shift every position, so it is refused; adapters inside the layers (LoRA and its "
            "like) are understood, and model.get_base_model() is the model without it."
        )


def device_of(module: Any) -> torch.device:
    """Where a model's inputs belong: the first parameter's device, or, where weights are offloaded,
    the one that they are brought to."""
    parameter = next(module.parameters())
    if parameter.device.type != "meta":
        return parameter.device
    for part in module.modules():
        queue = [getattr(part, "_hf_hook", None)]
        while queue:
            hook = queue.pop()
            queue += getattr(hook, "hooks", ())
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    here = (p.device for p in module.parameters() if p.device.type != "meta")
    return next(here, parameter.device)


def dtype_of(module: Any) -> torch.dtype:
    """The dtype of a model's first parameter that is no packed integer."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; every submodule is left as it was found."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def active_noise(module: torch.nn.Module) -> str | None:
    """The path of a submodule that drops or jitters numbers in a forward now; None if none does."""
    for path, part in module.named_modules():
        if not part.training:
            continue
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            if part.p > 0:
                return path or type(part).__name__
            continue
        for name, value in vars(part).items():
            noisy = "drop" in name or "jitter" in name
            if noisy and isinstance(value, float) and value > 0:
                return f"{path}.{name}" if path else name
    return None


def refuse_noise(module: torch.nn.Module) -> None:
    """Raise `TapError` for a model that drops numbers at random."""
    place = active_noise(module) if module.training else None
    if place is not None:
        raise TapError(
            f"The model is in training mode with dropout ({place}), so its attention is another at "
            "every run; call model.module.eval() first."
        )
