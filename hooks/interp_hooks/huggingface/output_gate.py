"""What an architecture does to its heads' outputs before W_O reads them: an output gate, a norm.

z is what W_O reads. In most architectures that is softmax·v itself, and attention's output can be
edited where it is made. Gated ones (Qwen3-Next, Qwen3.5, Laguna, AFMoE, …) multiply it by
σ(x W_θ) first, others norm it (BitNet), and there z is read and replaced at W_O's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from interp_hooks.call import Site
from interp_hooks.engine import Attended, at_projection
from interp_hooks.errors import TapError
from interp_hooks.huggingface.layout import Layout

#: largest difference, relative to the largest number, of gate · attention from what W_O reads
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


#: an attention module's id, and which of its forwards it is
Key = tuple[int, int]


@dataclass(frozen=True)
class Between:
    """Something stands between an attention's output and its output projection.

    Attributes:
        projection: whose input is z.
        gate: whether it multiplies each number by a factor that does not depend on it.
    """

    projection: torch.nn.Module
    gate: bool


class Probe:
    """Finds what stands between attention and W_O, in one forward, or two where something does.

    The first notes softmax·v and W_O's input of every attention. In the second each attention gives
    ones instead, so that a gate shows itself, f(1) = g and f(z) = z·g; W_O is given what it read
    the first time, so that every layer's input, and with it its gate, stays the same.
    """

    def __init__(self, layout: Layout):
        self._layout = layout
        self._stack = ExitStack()
        self._projections: dict[int, torch.nn.Module] = {}
        self._turn: dict[int, int] = {}  # of each attention module's forward at hand
        # by module and by which of its forwards it is: shared modules have several
        self._z: dict[Key, list[torch.Tensor]] = {}
        self._read: dict[Key, list[torch.Tensor]] = {}
        self._ones: dict[Key, torch.Tensor] = {}
        self._second = False

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def attended(self, module: torch.nn.Module, z: torch.Tensor, turn: int = 0) -> torch.Tensor:
        """Take note of an attention's output (batch, queries, heads, d), and say what to give;
        `turn` counts the forwards of the module before this one."""
        key = id(module), turn
        if self._second:
            self._turn[id(module)] = turn
            return torch.ones_like(z) if self._differs(key) else z
        if id(module) not in self._turn:
            projection = self._layout.find(module, "output_projection")
            if projection is not None:
                self._projections[id(module)] = projection
                hook = projection.register_forward_pre_hook(partial(self._reads, id(module)))
                self._stack.callback(hook.remove)
        self._turn[id(module)] = turn
        self._z.setdefault(key, []).append(z)
        return z

    def _reads(self, attention: int, projection: torch.nn.Module, args: tuple) -> tuple | None:
        key = attention, self._turn[attention]
        if not args or not isinstance(args[0], torch.Tensor):
            return None
        if not self._second:
            self._read.setdefault(key, []).append(args[0])
            return None
        if not self._differs(key):
            return None
        self._ones[key] = args[0]
        return (self._read[key][0], *args[1:])

    def _differs(self, key: Key) -> bool:
        """Whether W_O reads something else than the attention's output, head by head. Attention in
        several calls (windows of a picture) is put together in between, not changed."""
        z, read = self._z.get(key, []), self._read.get(key, [])
        if len(z) != 1 or len(read) != 1:
            return False
        batch, queries, heads, _ = z[0].shape
        per_head = read[0].numel() % (batch * queries * heads) == 0
        own = read[0].numel() == z[0].numel() and bool((read[0].reshape(z[0].shape) == z[0]).all())
        return per_head and read[0].shape[-1] % heads == 0 and not own

    def again(self) -> bool:
        """Whether a second forward is needed; it is counted as begun."""
        self._second = any(self._differs(key) for key in self._z)
        return self._second

    def between(self, module: torch.nn.Module, turn: int = 0) -> Between | None:
        """What stands between this attention and its W_O; None for nothing."""
        key = id(module), turn
        if not self._differs(key):
            return None
        z, read, ones = self._z[key][0], self._read[key][0], self._ones.get(key)
        gate = ones is not None and ones.numel() == z.numel() == read.numel()
        if gate:
            assert ones is not None
            expected, read = ones.reshape(z.shape).double() * z.double(), read.reshape(z.shape)
            scale = read.double().abs().max()
            error = (expected - read.double()).abs().max()
            gate = bool(error <= TOLERANCE.get(z.dtype, 3e-2) * scale)
        return Between(self._projections[id(module)], gate)


class LateOutputs:
    """Hands W_O's input to the tap as z, at the attentions where something stands in between."""

    def __init__(self, between: Mapping[Site, Between]):
        self._between = between
        self._waiting: dict[Site, Attended] = {}
        self._stack = ExitStack()

    def __deepcopy__(self, memo: Any) -> LateOutputs:
        return self  # of the model that is tapped, whatever is copied

    def __enter__(self) -> LateOutputs:
        for site, between in self._between.items():
            hook = between.projection.register_forward_pre_hook(partial(self._reads, site))
            self._stack.callback(hook.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._waiting.clear()
        self._stack.close()

    def forget(self) -> None:
        """What a forward left behind that did not come to W_O."""
        self._waiting.clear()

    def keep(self, attended: Attended) -> torch.Tensor:
        """The attention's own output, while the rest waits for W_O."""
        site = attended.call.site
        if site in self._waiting:
            raise TapError(
                f"The output projection of layer {site.layer} was not called between two "
                "attentions, so what it reads can't be told."
            )
        self._waiting[site] = attended
        return attended.z

    def _reads(self, site: Site, projection: torch.nn.Module, args: tuple) -> tuple | None:
        attended = self._waiting.pop(site, None)
        if attended is None:  # another forward of the projection, without attention
            return None
        read = args[0]
        z = read.reshape(*attended.z.shape[:3], -1)  # (batch, queries, heads, d)
        new = at_projection(attended, z)
        return None if new is z else (new.reshape(read.shape), *args[1:])
