"""A model compiled under the blocks that are open on it.

What was compiled before a block knows nothing of its tap, so that blocks run compiled code eagerly
(`wrapping.eagerly`). What is compiled here is traced with the tap in place, each time anew, and is
good for these blocks alone.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from interp_hooks.errors import TapError
from interp_hooks.told import LISTENERS, Listeners, Tracing, define, place
from interp_hooks.wrapping import uncompiled

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


def compiled(model: HookedModel, **options: Any) -> Callable[..., Any]:
    """The model's forward compiled by `torch.compile`, with what open blocks ask and edit.

    Callbacks are not compiled: they run as they are, with detached statistics, while the graph
    does.

    Args:
        model: a model with a block open.
        options: of `torch.compile`; fullgraph=True unless said otherwise.

    Returns:
        What takes the forward's arguments; inside these blocks only.

    Raises:
        TapError: no block is open; when it is called, others are open than when it was made, or
            something of the tap can't be compiled for this model.

    Example:
        >>> from interp_hooks import Question, compiled
        >>> seen = []
        >>> with model.watch(Question(frozenset({"max"})), seen.append), torch.no_grad():
        ...     run = compiled(model, backend="eager")
        ...     _ = run(torch.arange(8)[None])
        >>> len(seen), seen[2].max.shape
        (4, torch.Size([1, 8, 8]))
    """
    tap = model._tap
    blocks = tuple(tap.blocks)
    if not any(block.active for block in blocks):
        raise TapError(
            "No block is open on this model; open model.watch(...), model.observe(...) or "
            "model.edit(...) first, or use torch.compile as it is."
        )
    module = uncompiled(model.module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    # code of its own: compiled code is kept by it, and that of other blocks must not be found
    own = types.FunctionType(
        forward.__code__.replace(co_name=f"forward_{id(blocks)}"),
        forward.__globals__,
        closure=forward.__closure__,
    )
    define()
    with torch.compiler.set_stance("default"):
        run = torch.compile(own, **{"fullgraph": True, **options})

    name = f"{id(blocks)}:{own.__code__.co_name}"
    observers = [one for block in blocks for one in block.observers]
    listeners = Listeners({place(site): site for site in model.sites}, observers)
    LISTENERS[name] = listeners

    def call(*args: Any, **kwargs: Any) -> Any:
        tap.check_thread()
        now = tuple(tap.blocks)
        if len(now) != len(blocks) or any(a is not b for a, b in zip(now, blocks, strict=True)):
            raise TapError(
                "This forward was compiled under other blocks than are open now; make it anew "
                "inside these."
            )
        listeners.notes.begins()
        outer, Tracing.name = Tracing.name, name
        try:
            with torch.compiler.set_stance("default"):
                out = run(*args, **kwargs)
        except torch._dynamo.exc.Unsupported as error:
            first = str(error).strip().splitlines()[0]
            raise TapError(
                f"Under these blocks {model.name} can't be compiled into one graph ({first}); run "
                "it as it is, or with fullgraph=False."
            ) from error
        finally:
            Tracing.name = outer
        listeners.notes.ends()
        return out

    weakref.finalize(call, LISTENERS.pop, name, None)
    return call
