"""Edits of attention: the value that a user writes, and what a block holds of it for one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Literal, TypeVar

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.errors import EditError
from interp_hooks.protocol import Model
from interp_hooks.whole_numbers import quoted
from interp_kernels import Request, Result, Steer

Scope = Literal["all", "prefill", "decode"]


class CallEdit(ABC):
    """What changes at attention calls, in this order: `before`, `steer`, `attend`, `apply`.

    The interface of edits and of bound edits; subclasses override what they change.

    Example:
        >>> issubclass(Edit, CallEdit) and issubclass(BoundEdit, CallEdit)
        True
    """

    @property
    def needs_hidden(self) -> bool:
        """Whether calls must carry `hidden`, the residual stream that enters their layer."""
        return False

    @property
    def needs_tokens(self) -> bool:
        """Whether calls must carry `tokens`, the ids of the prompt."""
        return False

    def at(self, site: Site) -> bool:
        """Whether this site is concerned at all."""
        return True

    @abstractmethod
    def touches(self, call: AttentionCall) -> bool:
        """Whether this call is changed at all (its layer, tower and scope)."""

    def before(self, call: AttentionCall) -> AttentionCall:
        """The call with changed queries, keys, values, sinks or mask; by default the call
        itself."""
        return call

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        """What changes inside the attention call: logits, a rule over groups of keys, gains; None
        for nothing.

        Labels, spans and biases are in the call's key columns. `measure` gives statistics of the
        call's weights as the edits before this one leave them.
        """
        return None

    def rows(self, call: AttentionCall) -> tuple[int, int] | None:
        """The query rows (start, stop) that `steer` is for; None for all."""
        return None

    def alone(self, call: AttentionCall) -> torch.Tensor | None:
        """z (batch, heads, queries, d_head) by a way of its own, where no other edit acts on the
        call and nobody asks for weights; None, as by default, for the common way. The same z up to
        rounding."""
        return None

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        """What another attention gives in place of softmax·v, (batch, queries, heads, d_head).

        For edits that attend anew. Where an architecture gates (or norms) heads before W_O, this is
        still before it; must not write into the z it is given.
        """
        return z

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        """The new z (batch, queries, heads, d_head), as W_O reads it, after an output gate; must
        not write into the z it is given."""
        return z

    def route(self, site: Site) -> str:
        """Which route it takes there, for `explain`."""
        return "epilogue on z, after the attention kernel"


class Edit(CallEdit):
    """A declarative change of attention: a value, never written to.

    Subclasses are frozen dataclasses (in `interp.edits`). A block asks `bind(model)` for what it
    holds, so that one edit serves several models, blocks and threads at once; what an edit needs to
    know of a model (means, sizes, memories) lives in the bound one.

    Example:
        >>> class Halve(Edit):
        ...     def touches(self, call):
        ...         return call.site.layer == 2
        ...     def apply(self, call, z):
        ...         return z / 2
        >>> with model.edit(Halve()), model.capture_z() as halved:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> with model.capture_z() as own:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> bool((halved[2] == own[2] / 2).all())
        True
    """

    scope: Scope = "all"

    def bind(self, model: Model) -> CallEdit:
        """The edit for this model; raises `EditError` or `HeadError` where it cannot apply."""
        return BoundEdit(self)

    def is_identity(self) -> bool:
        """True if the parameters change nothing; then the model's own path stays untouched
        (bit-equal)."""
        return False

    def in_scope(self, call: AttentionCall) -> bool:
        """Whether `call` belongs to the edit's scope (prefill: everything that is not a one-token
        decode step)."""
        return self.scope == "all" or (self.scope == "decode") == call.is_decode


E = TypeVar("E", bound=CallEdit)


class BoundEdit(CallEdit, Generic[E]):
    """An edit as one block holds it for one model: by default what the edit itself says.

    Edits that need something of the model (reference means, a memory of sinks, a backend) return a
    subclass from `bind` that keeps it and overrides what depends on it.

    Args:
        edit: the edit, never written to.

    Example:
        >>> edit = interp.edits.Ablate(["L2H3"])
        >>> edit.bind(model).edit is edit
        True
    """

    def __init__(self, edit: E):
        self.edit = edit

    @property
    def needs_hidden(self) -> bool:
        return self.edit.needs_hidden

    @property
    def needs_tokens(self) -> bool:
        return self.edit.needs_tokens

    def at(self, site: Site) -> bool:
        return self.edit.at(site)

    def touches(self, call: AttentionCall) -> bool:
        return self.edit.touches(call)

    def before(self, call: AttentionCall) -> AttentionCall:
        return self.edit.before(call)

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        return self.edit.steer(call, measure)

    def rows(self, call: AttentionCall) -> tuple[int, int] | None:
        return self.edit.rows(call)

    def alone(self, call: AttentionCall) -> torch.Tensor | None:
        return self.edit.alone(call)

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        return self.edit.attend(call, z)

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        return self.edit.apply(call, z)

    def route(self, site: Site) -> str:
        return self.edit.route(site)


def edits_of(given: Any) -> list[Any]:
    """Edits as a list: of one, of several, of None for none.

    Raises:
        EditError: what is no edit, with what it is instead.

    Example:
        >>> from interp_hooks.edit import edits_of
        >>> edits_of(interp.edits.Ablate("L2H3"))
        [Ablate(heads=(L2H3,), mode='zero', reference=None, seed=0, scope='all', queries=None)]
    """
    if given is None:
        return []
    if isinstance(given, (CallEdit, type, str, bytes, Mapping)) or not isinstance(given, Iterable):
        given = [given]
    return [checked_edit(one) for one in given]


def checked_edit(one: Any) -> Any:
    """The edit itself. Raises `EditError` for what is none."""
    if isinstance(one, type) and issubclass(one, CallEdit):
        raise EditError(
            f"{one.__name__} is the kind of an edit, not an edit; make one of it, like "
            f'{one.__name__}("L5H1") (help(interp.edits.{one.__name__}) says what it takes).'
        )
    if isinstance(one, type) or not hasattr(one, "touches"):
        raise EditError(
            f"{quoted(one)} is not an edit; edits are objects of interp.edits; interp.edits.load "
            "reads a file of them, from_json a dictionary."
        )
    return one


class LiveEdit(CallEdit):
    """A change that is no value: it notes what it sees, or calls a function.

    It is for one block of one model, and binds to itself.

    Example:
        >>> class Count(LiveEdit):
        ...     calls = 0
        ...     def apply(self, call, z):
        ...         self.calls += 1
        ...         return z
        >>> count = Count()
        >>> with model.edit(count):
        ...     _ = model.logits(torch.arange(8)[None])
        >>> count.calls
        4
    """

    def bind(self, model: Model) -> CallEdit:
        return self

    def is_identity(self) -> bool:
        return False

    def touches(self, call: AttentionCall) -> bool:
        return True
