"""Gradient checkpointing under the tap: a layer that is run again in the backward pass runs under
the edits of its first run, and is not recorded again.

transformers hands each layer to a checkpoint function, which the backward pass calls a second
time, inside the block or after it. While a block is open that function is given a layer that
remembers what was edited.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from interp_hooks.blocks import Tap
from interp_hooks.call import AttentionCall
from interp_hooks.errors import TapError
from interp_hooks.prompt_tokens import PromptTokens
from interp_hooks.recording import LayerStats

#: the attribute under which transformers keeps a module's checkpoint function
_ATTRIBUTE = "_gradient_checkpointing_func"

#: called at a layer's first run; what it gives makes the surroundings of a later run of the layer
#: (its callable, its arguments)
Again = Callable[[], Callable[[Callable[..., Any], tuple], AbstractContextManager[None]]]

_INSIDE = threading.local()  # .depth: runs of remembered layers that are under way


class Checkpoints:
    """The checkpoint functions of a model, wrapped while a block is open.

    Args:
        root: the model.
        again: called at a layer's first run; what it gives makes the surroundings of a later one.
    """

    def __init__(self, root: torch.nn.Module, again: Again) -> None:
        self._parts = [part for part in root.modules() if hasattr(part, "gradient_checkpointing")]
        self._again = again
        self._wrapped: list[tuple[torch.nn.Module, Any, Any]] = []

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: Any) -> None:
        for part, own, mine in self._wrapped:
            if part.__dict__.get(_ATTRIBUTE) is mine:
                part.__dict__[_ATTRIBUTE] = own
        self._wrapped.clear()

    def wrap(self) -> None:
        """Wrap those that are not yet: checkpointing may be turned on while a block is open."""
        for part in self._parts:
            own = part.__dict__.get(_ATTRIBUTE)
            if own is not None and not isinstance(own, _Remembering):
                mine = _Remembering(own, self._again)
                part.__dict__[_ATTRIBUTE] = mine
                self._wrapped.append((part, own, mine))


class _Remembering:
    """A checkpoint function that is given a layer which knows its first run from later ones."""

    def __init__(self, own: Callable[..., Any], again: Again) -> None:
        self._own, self._again = own, again

    def __deepcopy__(self, memo: Any) -> Any:
        return self._own  # a copy of the model is not tapped

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._own(_Layer(run, self._again), *args, **kwargs)


class _Layer:
    """A layer's run: the first as it is, later ones as the first was."""

    def __init__(self, run: Callable[..., Any], again: Again) -> None:
        self._run, self._make = run, again
        self._surroundings: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            if self._surroundings is None:
                self._surroundings = self._make()
            else:
                stack.enter_context(self._surroundings(self._run, args))
            _INSIDE.depth = getattr(_INSIDE, "depth", 0) + 1
            try:
                return self._run(*args, **kwargs)
            finally:
                _INSIDE.depth -= 1


def layer_of(run: Any) -> torch.nn.Module | None:
    """The module that a checkpointed run belongs to, where that shows."""
    if isinstance(run, partial) and run.args and isinstance(run.args[0], torch.nn.Module):
        return run.args[0]
    return getattr(run, "__self__", None)


def foreign() -> bool:
    """Whether a checkpoint of the caller's own runs now, which would be run again without its
    edits: `torch.utils.checkpoint` around a layer, not transformers' gradient checkpointing."""
    depth: int = getattr(_INSIDE, "depth", 0)
    if depth or torch.compiler.is_compiling():
        return False
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = top(True) if top is not None else None
    pack = getattr(hooks[0], "__qualname__", "") if hooks else ""
    return in_backward() or pack.startswith("_checkpoint_hook")


def in_backward() -> bool:
    """Whether the backward pass runs in this thread now."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


@dataclass(frozen=True)
class Recomputed:
    """A layer that is run again for its gradient: what its first run was under, and this run.

    Attributes:
        tap: its edits, and its observers, whom nobody hears: what they ask decides which tensors
            are saved, and these must be the same.
        tokens, images: of the prompt then.
        weights: whether the attention weights were asked for.
        run, args: the layer's callable, and what it is given.
    """

    tap: Tap
    tokens: PromptTokens
    images: torch.Tensor | None
    weights: bool
    run: Any = None
    args: tuple = ()

    @classmethod
    def of(cls, tap: Tap, tokens: PromptTokens, images: torch.Tensor | None, weights: bool) -> Any:
        """What a layer's first run, now, is under."""
        unheard = [replace(observer, callback=_unheard) for observer in tap.observers]
        return cls(Tap(unheard, tap.edits, tap.backend), tokens.copy(), images, weights)

    @property
    def layer(self) -> torch.nn.Module | None:
        """The module, where that shows."""
        return layer_of(self.run)


def _unheard(stats: LayerStats) -> None:
    """An observer's callback that tells nobody."""


def recomputed_elsewhere(call: AttentionCall, tap: Tap) -> bool:
    """Whether a checkpoint of the caller's own runs this layer again now, which nobody hears.

    Raises `TapError` where it does, or will do, so without the edits that touch it.
    """
    if not foreign():
        return False
    if any(edit.touches(call) for edit in tap.edits):
        raise TapError(
            "This layer runs in a torch.utils.checkpoint of your own, which runs it again without "
            "these edits in the backward pass; turn on model.gradient_checkpointing_enable() "
            "instead, which is understood."
        )
    return in_backward()
