"""The residual stream, read and written by plain module hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from interp_hooks.activations import Hook, Residual
from interp_hooks.errors import TapError
from interp_hooks.huggingface.layout import DEFAULT, Layout, middle_norm


class StreamWatch:
    """The residual stream that enters each block, taken when it is asked for: a forward pre-hook of
    the blocks. It is kept from a block's start to its attention call, and only while `wanted()`."""

    def __init__(self, wanted: Callable[[], bool]) -> None:
        self.wanted = wanted
        self._entered: dict[int, torch.Tensor] = {}

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.wanted():
            self._entered[id(module)] = (
                kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            )

    def forget(self) -> None:
        """What a forward left behind that did not come to its attention calls."""
        self._entered.clear()

    def take(self, block: torch.nn.Module | None) -> torch.Tensor | None:
        """(batch, queries, d_model) that entered `block`; None where nobody wanted it."""
        return self._entered.pop(id(block), None)


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple | list) else value  # OpenAI's GPT gives a list


def _swap(value: Any, new: torch.Tensor) -> Any:
    if isinstance(value, list):
        return [new, *value[1:]]
    return (new, *value[1:]) if isinstance(value, tuple) else new


@contextmanager
def capture(
    blocks: dict[int, torch.nn.Module],
    norm: torch.nn.Module | None,
    write: Hook | None,
    keep: bool = True,
    layout: Layout = DEFAULT,
) -> Iterator[Residual]:
    """Hooks on transformer `blocks` (by layer) and the final `norm` for the length of the
    with-block."""
    residual = Residual(keep)
    shapes: dict[int, torch.Size] = {}  # of each block's input
    # what a rewritten "mid" adds to the skip connection around the MLP
    skipped: dict[int, torch.Tensor] = {}

    def see(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        new = None if write is None else write(place, layer, tensor)
        stream = tensor if new is None else new
        residual.append("final" if place == "final" else (place, layer), stream.detach())
        return new

    def middle_of(layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        """The norm's hook sees only one branch of the stream; the other one is made up for at the
        block's output."""
        _check_one_stream(layer, shapes[layer], tensor)
        stream = tensor.reshape(shapes[layer])  # OPT flattens batch and queries here
        new = see("mid", layer, stream)
        if new is None:
            return None
        skipped[layer] = new - stream
        return new.reshape(tensor.shape)

    def reads(place: str, layer: int) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
            named, tensor = _stream(layer, module, args, kwargs)
            if place == "pre":
                shapes[layer] = tensor.shape
            new = middle_of(layer, tensor) if place == "mid" else see(place, layer, tensor)
            if new is None:
                return None
            return (args, {**kwargs, "hidden_states": new}) if named else ((new, *args[1:]), kwargs)

        return hook

    def makes(place: str, layer: int) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> Any:
            tensor = _first(output)
            moved = place == "post" and layer in skipped
            if moved:
                tensor = tensor + skipped.pop(layer)
            new = see(place, layer, tensor)
            if new is None and not moved:
                return None
            return _swap(output, tensor if new is None else new)

        return hook

    with ExitStack() as stack:
        for layer, block in blocks.items():
            stack.enter_context(
                block.register_forward_pre_hook(reads("pre", layer), with_kwargs=True)
            )
            between = middle_norm(block, layout)
            if between is not None:
                stack.enter_context(
                    between.register_forward_pre_hook(reads("mid", layer), with_kwargs=True)
                )
            stack.enter_context(block.register_forward_hook(makes("post", layer)))
        if norm is not None:
            stack.enter_context(norm.register_forward_hook(makes("final", max(blocks))))
        yield residual


def _check_one_stream(layer: int, entered: torch.Size, middle: torch.Tensor) -> None:
    """Raises `TapError` where what the MLP's norm takes is not as large as what entered the
    block."""
    if middle.numel() != entered.numel():
        raise TapError(
            f"Layer {layer} takes a stream {tuple(entered)} and its MLP's norm "
            f"{tuple(middle.shape)}: several streams run beside each other, which this toolkit "
            "does not follow."
        )


def _stream(
    layer: int, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[bool, torch.Tensor]:
    """Whether a module is given the stream by name, and the stream. Raises `TapError`."""
    if "hidden_states" in kwargs:
        return True, kwargs["hidden_states"]
    if args and isinstance(args[0], torch.Tensor):
        return False, args[0]
    raise TapError(
        f"Layer {layer} takes the residual stream neither first nor as hidden_states=, so it can't "
        f"be read in {type(module).__name__}."
    )
