"""How a compiled forward tells its observers: by operators that the compiler doesn't look into.

Traced as they are, callbacks would be part of the graph, and what they append to would be guarded,
so that every forward would compile anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from interp_hooks.errors import TapError
from interp_hooks.forward_notes import ForwardNotes
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    from interp_hooks.blocks import Observer
    from interp_hooks.call import Site

#: Fields of a layer's statistics that hold tensors by name.
_NAMED = ("rows", "pair_mass", "received", "received_count")


@dataclass
class Listeners:
    """Whom the forwards of one compiled function tell.

    Attributes:
        sites: place → site.
        observers: in their order.
        notes: of the forward at hand.
    """

    sites: dict[str, Site]
    observers: list[Observer]
    notes: ForwardNotes = field(default_factory=ForwardNotes)


#: By the name of a compiled function, as long as it lives.
LISTENERS: dict[str, Listeners] = {}


class Tracing:
    """The compiled function that runs now."""

    name = ""


def place(site: Site) -> str:
    """What a site is called in a graph."""
    return f"{site.tower}/{site.kind}/{site.layer}"


@lru_cache
def define() -> None:
    """Make the operators; once."""

    @torch.library.custom_op("interp_hooks::told", mutates_args=())
    def told(
        name: str, where: str, observer: int, labels: str, q_start: int, k_start: int,
        tensors: list[torch.Tensor],
    ) -> None:  # fmt: skip
        listeners = LISTENERS[name]
        stats = LayerStats.__new__(LayerStats)
        stats.site, stats.call, stats.z = listeners.sites[where], None, None
        stats.q_start, stats.k_start = q_start, k_start
        for kind in _NAMED:
            setattr(stats, kind, {})
        for label, tensor in zip(labels.split("\n"), tensors, strict=True):
            kind, _, key = label.partition("=")
            if kind in _NAMED:
                getattr(stats, kind)[key] = tensor
            else:
                setattr(stats, kind, tensor)
        listeners.observers[observer].callback(stats)

    @torch.library.custom_op("interp_hooks::finite", mutates_args=())
    def finite(name: str, where: str, z: torch.Tensor) -> None:
        listeners = LISTENERS[name]
        listeners.notes.check_finite_at(listeners.sites[where], z)

    for op, own in ((told, torch.ops.interp_hooks.told), (finite, torch.ops.interp_hooks.finite)):
        op.register_fake(lambda *args: None)
        _keep(own.default)


def _keep(op: Any) -> None:
    """An operator without results is left out of a graph unless its effect is known."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    _register_effectful_op(op, _EffectType.ORDERED)


def tell(site: Site, z: torch.Tensor, answers: list[tuple[Observer, LayerStats]]) -> None:
    """In a forward that is being compiled: z is looked at, and the observers are told, when it
    runs."""
    name = Tracing.name
    if not name:
        raise TapError(
            "A forward inside a block is compiled by interp_hooks.compiled(model), not by "
            "torch.compile."
        )
    torch.ops.interp_hooks.finite(name, place(site), z)
    for observer, stats in answers:
        if stats.call is not None or observer.question.weights is not None:
            raise TapError(
                "Attention calls and their weights can't be handed over by a compiled forward; "
                "run it as it is."
            )
        labels, tensors = ["queries", "keys"], [stats.queries, stats.keys]
        if stats.z is not None:
            labels.append("z")
            tensors.append(stats.z)
        for kind in _NAMED:
            for key, tensor in getattr(stats, kind).items():
                labels.append(f"{kind}={key}")
                tensors.append(tensor)
        index = next(i for i, one in enumerate(LISTENERS[name].observers) if one is observer)
        torch.ops.interp_hooks.told(
            name, place(site), index, "\n".join(labels), stats.q_start, stats.k_start,
            [t.detach() for t in tensors],
        )  # fmt: skip
