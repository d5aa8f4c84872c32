"""What is kept from layer to layer of one forward, so that no layer makes the host wait for the
device: whether outputs are finite, and what questions ask in the coordinates of its calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from interp_hooks.errors import ActivationError

if TYPE_CHECKING:
    from interp_kernels import Request


#: An attention call, and its site: the module of theirs imports this one.
AttentionCall: TypeAlias = Any
Site: TypeAlias = Any


def waits(device: torch.device) -> bool:
    """Whether looking at a tensor of this device waits for what runs on it."""
    return device.type != "cpu"


def fetched(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """CPU copies in float32, which wait for each device once and not once a tensor.

    Example:
        >>> fetched([torch.tensor([1, 2]), torch.tensor(0.5)])
        [tensor([1., 2.]), tensor(0.5000)]
    """
    found: list[torch.Tensor | None] = [None] * len(tensors)
    for device in dict.fromkeys(t.device for t in tensors):
        own = [i for i, t in enumerate(tensors) if t.device == device]
        if waits(device):
            flat = _copied(torch.cat([tensors[i].detach().float().flatten() for i in own]))
            parts = flat.split([tensors[i].numel() for i in own])
        else:
            parts = tuple(tensors[i].detach().float() for i in own)
        for i, part in zip(own, parts, strict=True):
            found[i] = part.view(tensors[i].shape) if waits(device) else part
    return [t for t in found if t is not None]


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.cpu()


class ForwardNotes:
    """One forward's: `begins` and `ends` with it."""

    def __init__(self) -> None:
        self._finite: list[tuple[Site, torch.Tensor]] = []
        self._requests: dict[Any, tuple[Any, Request]] = {}

    def begins(self) -> None:
        """What a forward before it left, or one that failed, is forgotten."""
        if torch.compiler.is_compiling():
            return
        self._finite.clear()
        self._requests.clear()

    def ends(self) -> None:
        """Raise `ActivationError` naming the first layer whose output was not finite."""
        if torch.compiler.is_compiling():
            return
        noted, self._finite = self._finite, []
        self._requests.clear()
        flags = fetched([flag for _, flag in noted])
        for (site, _), flag in zip(noted, flags, strict=True):
            if not bool(flag):
                raise_broken(site)

    def check_finite(self, call: AttentionCall, z: torch.Tensor) -> None:
        """As `check_finite_at`, of a call."""
        self.check_finite_at(call.site, z)

    def check_finite_at(self, site: Site, z: torch.Tensor) -> None:
        """Raise `ActivationError` if z has NaN or infinity: now on a CPU, which has computed z when
        asked, so that looking costs nothing and nobody is told of broken numbers; when the forward
        ends on a device, which each layer's look would stop."""
        if not z.numel():
            return
        finite = torch.isfinite(torch.stack(torch.aminmax(z.detach()))).all()  # no copy of z
        if waits(z.device):
            self._finite.append((site, finite))
        elif not bool(finite):
            raise_broken(site)

    def request(
        self, question: Any, call: AttentionCall, make: Callable[[AttentionCall], Request]
    ) -> Request:
        """What `make` says a question asks of a call, once for all layers with such calls: its
        indices are made, and brought to the device, once a forward."""
        if torch.compiler.is_compiling():
            return make(call)
        mask = call.mask
        key = (
            id(question),
            *(mask.q_start, call.n_queries, mask.k_start, call.n_keys),
            *(call.batch, call.copies, call.value.device),
        )
        found = self._requests.get(key)
        if found is None:  # the question is kept, for another could get its id
            found = self._requests[key] = question, make(call)
        return found[1]


def raise_broken(site: Site) -> None:
    """Raise `ActivationError` for a layer whose output has NaN or infinity."""
    where = f"{site.tower + ' ' if site.tower else ''}layer {site.layer}"
    raise ActivationError(
        f"The attention output of {where} has NaN or infinity; check the weights, or load the "
        "model in a wider "
        "dtype (dtype='float32')."
    )
