"""Which modules make an attention's queries, keys, values and output: found and proved in one
forward.

Every module inside the attention is watched. The one that reads what the attention reads, and whose
outputs, cut into heads, are the very q (k, v) of the attention call, is the projection; the one
that reads z is W_O. What is not found so has no matrix that this toolkit would vouch for, and is
refused by name. Nothing rests on the name of a class or module; names that the user gave are held
to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.head_shards import HeadShards
from interp_hooks.huggingface.layout import Layout
from interp_hooks.huggingface.shards import made_whole, read_whole
from interp_hooks.huggingface.split import Split, agree, find

WORDS = {"q": "queries", "k": "keys", "v": "values"}
FIELDS = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True)
class Part:
    """Where queries, keys or values leave a projection; or the output projection.

    Attributes:
        projection: the module.
        like: (0, width), what it reads.
        numbers: (heads or kv_heads, d) of its outputs; of the output projection () for all.
        normed: whether a norm of queries or keys follows it.
        factor: what all its numbers are multiplied by on their way to the call (OPT scales its
            queries, YaRN queries and keys).
    """

    projection: torch.nn.Module
    like: torch.Tensor
    numbers: torch.Tensor
    normed: bool = False
    factor: float = 1.0


class Unexplained(str):
    """Why no module makes queries, keys or values, where several together may."""


class WrongLayout(str):
    """Why what the user's layout names is not what it says."""


#: place (q, k, v) → what makes it, or why that is not known
Parts = dict[str, Part | str]
Step = tuple[torch.nn.Module, torch.Tensor, torch.Tensor]  # a module, its input and output


@dataclass
class Record:
    """One forward of one attention: what it read, the calls it made, what its modules did."""

    x: torch.Tensor | None = None
    given: list[torch.Tensor] = field(default_factory=list)  # x, and what else it was handed
    calls: list[AttentionCall] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def heads(self, place: str) -> torch.Tensor:
        """(tokens, heads or kv_heads, d) of the calls' queries, keys or values, in the order of
        x."""
        tensors = [getattr(call, FIELDS[place]) for call in self.calls]
        return torch.cat([t.detach().transpose(1, 2).flatten(0, 1) for t in tensors])


class Watched:
    """One attention under watch.

    `record` is of its last forward that made a call; `parts`, what made its heads there.
    """

    def __init__(self, site: Site, attention: torch.nn.Module, around: Any, layout: Layout):
        self.site, self.attention, self._layout = site, attention, layout
        self.inside = [m for m in attention.modules() if m is not attention]
        self._order = {id(m): i for i, m in enumerate(self.inside)}
        beside = layout.find(around, "output_projection")  # beside the attention, in BERT
        apart = beside is not None and beside is not attention and id(beside) not in self._order
        self.beside = [beside] if apart and beside is not None else []
        self.record = self._now = Record()
        self.parts: Parts = {}
        self._shards: HeadShards | None = None

    def called(self, call: AttentionCall) -> None:
        """Take note of an attention call of the forward at hand."""
        self._shards = call.shards
        self._now.calls.append(call.whole())

    def hooks(self, last: dict[str, Split], keep: bool) -> Iterator[Any]:
        """Register what records a forward."""

        def begin(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            self._now = Record(_first(args, kwargs), tensors)

        def step(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            given = _first(args, kwargs)
            made = output[0] if isinstance(output, tuple) else output
            if given is not None and isinstance(made, torch.Tensor):
                step = read_whole(module, given), made_whole(module, made)
                self._now.steps.append((module, *step))

        def end(module: Any, args: Any, output: Any) -> None:
            if not self._now.calls:  # of a module that stands for several layers, another's turn
                return
            record = self.record = self._now
            # of a wrapper and what it wraps, the wrapper comes first
            record.steps.sort(key=lambda s: self._order.get(id(s[0]), -1))
            if self.site.kind != "self" or keep:
                return
            self.parts = {place: self._made(place, last) for place in WORDS}
            width = record.calls[0].value.shape[-1]
            record.calls = []
            record.steps = [s for s in record.steps if s[1].shape[-1] % width == 0]

        for module in [*self.inside, *self.beside]:
            yield module.register_forward_hook(step, with_kwargs=True)
        yield self.attention.register_forward_pre_hook(begin, with_kwargs=True)
        yield self.attention.register_forward_hook(end)

    def _made(self, place: str, last: dict[str, Split]) -> Part | str:
        """The projection of queries, keys or values, or why there is none."""
        record, target = self.record, self.record.heads(place)
        x = record.x
        if x is None or x.numel() == 0 or math.prod(x.shape[:-1]) != len(target):
            return f"its {WORDS[place]} are not of the tokens that it reads"
        names = [n for what in (FIELDS[place], "fused", "interleaved") for n in self._own(what)]
        named = [m for name in names if (m := _under(self.attention, name)) is not None]
        readers = [
            (module, out.detach().reshape(len(target), -1))
            for module, given, out in record.steps
            if (not named or module in named) and _same(given, x) and not out.numel() % len(target)
        ]
        step, like = record.calls[0].value.shape[-1], x.detach().new_empty(0, x.shape[-1])

        def projection(
            wanted: torch.Tensor, turned: bool, normed: bool, scaled: bool = False
        ) -> Part | None:
            for module, out in readers:
                split = find(out, wanted, turned, step, last.get(place), scaled)
                if split is not None:
                    last[place] = split
                    numbers = split.numbers(out.shape[1], *target.shape[1:])
                    made = out[:, numbers.to(out.device)].double()
                    factor = float(wanted.double().norm() / made.norm()) if scaled else 1.0
                    return Part(module, like, numbers, normed, factor)
            return None

        if (part := projection(target, place != "v", False)) is not None:
            return part
        if (part := projection(target, place != "v", False, scaled=True)) is not None:
            return part
        for given in self._norms(target):
            if (part := projection(given, True, True)) is not None:
                if place == "v":
                    return "its values are normed after their projection"
                return part
        if named:
            return WrongLayout(
                f"what the layout names does not give the {WORDS[place]} of its attention"
            )
        return Unexplained(
            f"no projection of what it reads gives the {WORDS[place]} of its attention"
        )

    def _norms(self, target: torch.Tensor) -> Iterator[torch.Tensor]:
        """What modules read, (tokens, heads, d), that give the call's queries (keys, values), but
        for a factor a token (learned, or that grows with the position)."""
        for _, given, out in self.record.steps:
            given, out = (self._of_all_heads(t, target) for t in (given, out))
            if given.numel() != target.numel() or out.numel() != target.numel():
                continue
            for by_token in (True, False):
                shaped = [_shaped(t.detach(), target, by_token) for t in (given, out)]
                read, gave = shaped
                if read is None or gave is None:
                    continue
                if agree(gave, target, True, scaled=True):
                    yield read

    def _of_all_heads(self, tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What a module between projection and call read or gave, (batch, tokens, heads, d) or
        (batch, heads, tokens, d), with the heads of all processes."""
        shards = self._shards
        if shards is None or tensor.ndim != 4 or tensor.numel() * shards.size != target.numel():
            return tensor
        heads = target.shape[1]
        by_token = tensor.shape[2] * shards.size == heads
        return shards.whole(tensor, 2 if by_token else 1)

    def _added(self, made: torch.Tensor, out: torch.Tensor, most: float) -> bool:
        """Whether what a module gave is added to the stream inside the attention: to what the
        attention was handed (BLOOM), or to its input before a norm (ALBERT)."""

        def close(one: torch.Tensor, other: torch.Tensor) -> bool:
            return one.shape == other.shape and bool(
                (one - other).abs().max() <= most * other.abs().max()
            )

        added = [made + t for t in self.record.given if t.shape == made.shape]
        return any(
            close(total, out) or any(close(given, total) for _, given, _ in self.record.steps)
            for total in added
        )

    def _own(self, what: str) -> tuple[str, ...]:
        """The user's names of a field."""
        return tuple(getattr(self._layout, what))

    def output(self, z: torch.Tensor, out: torch.Tensor, most: float) -> Part | str:
        """The output projection: what reads z (batch, queries, heads, d) and gives `out`, the
        attention's output, if it stands inside; or why there is none. `most`: the largest
        difference, relative to the largest number, that is rounding."""
        named = [m for n in self._own("output_projection") if (m := _under(self.attention, n))]
        readers = [s for s in self.record.steps if (not named or s[0] in named) and _same(s[1], z)]
        if not readers:
            if named:
                return WrongLayout("what the layout names as output projection does not read z")
            return (
                "it has no output projection this toolkit knows; name it with "
                "layout=Layout(output_projection=…)"
            )
        error = math.inf
        for module, given, made in readers:
            if module in self.beside:
                error = 0.0
            elif made.numel() == out.numel():
                apart = (made.double().flatten() - out.double().flatten()).abs().max()
                error = float(apart / out.double().abs().max().clamp_min(1e-6))
            if error <= most or self._added(made, out, most):
                like = given.detach().new_empty(0, given.shape[-1])
                return Part(module, like, torch.empty(0, dtype=torch.long))
        if math.isinf(error):
            return "what reads z gives another number of numbers than the layer"
        return f"Σ_h z_h W_O,h differs from the layer's output by {error:.1e} of its size"


@contextmanager
def watching(
    attentions: Iterable[tuple[Site, torch.nn.Module, torch.nn.Module]],
    layout: Layout,
    keep: bool = False,
) -> Iterator[dict[Site, Watched]]:
    """Site → `Watched`, filled by the forwards of the block; with `keep`, their records are left as
    they are instead of solved.

    Args:
        attentions: (site, attention, the module around it).
        layout: the user's names.
    """
    watched = {site: Watched(site, m, around, layout) for site, m, around in attentions}
    last: dict[str, Split] = {}  # neighbouring layers are cut alike
    with ExitStack() as stack:
        for one in watched.values():
            for handle in one.hooks(last, keep):
                stack.callback(handle.remove)
        yield watched


def _under(module: Any, name: str) -> torch.nn.Module | None:
    for step in name.split("."):
        module = getattr(module, step, None)
    return module if isinstance(module, torch.nn.Module) else None


def _first(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first tensor that a module is given."""
    given = [*args, kwargs.get("hidden_states"), *kwargs.values()]
    return next((t for t in given if isinstance(t, torch.Tensor)), None)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (
        one.numel() == other.numel()
        and one.device == other.device
        and torch.equal(one.flatten(), other.flatten())
    )


def _shaped(tensor: torch.Tensor, target: torch.Tensor, by_token: bool) -> torch.Tensor | None:
    """A tensor as (tokens, heads, d), stored token by token or (batch, heads, tokens, d)."""
    if by_token:
        return tensor.reshape(target.shape)
    if tensor.ndim == 4 and tensor.shape[1] == target.shape[1]:
        return tensor.transpose(1, 2).reshape(target.shape)
    return None
