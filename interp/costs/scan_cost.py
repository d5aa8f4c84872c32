"""What a scan will cost: passes, seconds and gigabytes, from a configuration alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from interp.costs import machines
from interp.costs.machines import Machine
from interp.costs.passes import EVIDENCE, Pass, passes_of
from interp.costs.shape import BYTES, Shape, shape_of
from interp.errors import InputError
from interp.scan.evidence import comparing
from interp.support.checked import whole_number

#: bytes of a statistic of a row, and how many of them a scan keeps of a layer at a time
STATISTIC, KEPT = 4, 8


@dataclass(frozen=True)
class ScanCost:
    """What a scan will cost on machines of one kind.

    Attributes:
        model: its name. machine: the kind. rests_on: what the seconds rest on.
        seconds: (at least, at most), on all the machines together.
        bytes_weights, bytes_cache, bytes_working: of one copy, at the longest text.
        gpus: how many there are; 0 for a CPU. copies: of the model that are at work side by side.
        gpus_a_copy: how many GPUs a copy takes; 0 for a CPU.
        passes: the forwards. notes: what is not counted, and what will not do.

    Example:
        >>> cost = interp.scan_cost("llama", context=256, samples=2)
        >>> cost.model, cost.gpus, round(cost.bytes_weights / 1e6, 1)
        ('pocket-llama', 0, 4.5)
    """

    model: str
    machine: str
    rests_on: str
    seconds: tuple[float, float]
    bytes_weights: float
    bytes_cache: float
    bytes_working: float
    gpus: int
    copies: int
    gpus_a_copy: int
    passes: list[Pass]
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> float:
        """Of one copy of the model at work."""
        return self.bytes_weights + self.bytes_cache + self.bytes_working

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        said = asdict(self)
        return {**said, "bytes": self.bytes, "passes": [p._asdict() for p in self.passes]}


def scan_cost(
    model: str | Shape,
    context: int = 1024,
    samples: int = 16,
    scores: str | list[str] = "default",
    *,
    gpus: int = 0,
    chunk: int | None = None,
    dtype: str | None = None,
) -> ScanCost:
    """What a scan of a text model will cost, from its configuration alone.

    Seconds rest on the benchmarks that came with this version (`interp
    bench`), with their errors; where nothing was measured on a machine, between what its hardware
    allows and what the benchmarks ask for, which `rests_on` says.

    Args:
        model: a name, a hub id (its config.json is enough), a folder, or a config.json.
        context, samples, scores: of the scan.
        gpus: how many H200s, a worker on each or on as many as a copy needs; 0 for the CPU of the
            benchmarks.
        chunk: tokens that a text is read at a time, as `interp.scan_heads` takes it.
        dtype: of the weights; by default float32 on a CPU and the checkpoint's on GPUs.

    Returns:
        A `ScanCost`.

    Raises:
        ModelError, InputError, UnknownNameError, OutputError.

    Example:
        >>> cost = interp.scan_cost("llama", context=1024, samples=4)
        >>> cost.copies, len(cost.passes) >= 3, cost.seconds[0] < cost.seconds[1]
        (1, True, True)
    """
    context = whole_number(context, "The context")
    samples = whole_number(samples, "samples, the number of inputs,")
    if context < 32 or samples < 1:
        raise InputError("A scan needs at least 1 sample and a context of at least 32 tokens.")
    if gpus < 0 or (chunk is not None and chunk < 1):
        raise InputError("There can't be fewer than no GPUs, nor chunks of less than a token.")
    shape = shape_of(model) if isinstance(model, str) else model
    machine = machines.h200() if gpus else machines.cpu()
    kind = dtype or (shape.dtype if gpus else "float32")
    if kind not in BYTES:
        raise InputError(f"{kind!r} is not a dtype of weights; use one of {', '.join(BYTES)}.")
    passes, notes = passes_of(scores, context, samples)
    weights, cache, working = _bytes(shape, context, chunk, BYTES[kind])
    need = math.ceil((weights + cache + working) / machine.memory) if machine.memory else 0
    copies = max(1, gpus // need) if need else 1
    seconds = _seconds(shape, passes, machine, copies, weights + cache)
    if need > gpus:
        notes.append(
            f"One copy takes {need} GPUs, and there are {gpus}: the rest would be offloaded "
            "(device_map='auto'), which reads it anew in every forward; seconds are without that."
        )
    if shape.positions is not None and context > shape.positions:
        notes.append(f"The model reads {shape.positions:,} tokens at most; add --extrapolate.")
    return ScanCost(
        shape.name,
        machine.name,
        machine.measured,
        seconds,
        weights,
        cache,
        working,
        gpus,
        copies,
        need,
        passes,
        notes,
    )


def _bytes(shape: Shape, context: int, chunk: int | None, size: int) -> tuple[float, float, float]:
    """Bytes of the weights, of the cache of the longest text, and of what a forward works with."""
    kept = sum(min(context, w) if w is not None else context for w in shape.windows)
    cache = 2.0 * kept * shape.kv_heads * shape.d_head * size
    at_once = min(context, chunk or context)
    numbers = machines.working()(machines.working_features(shape, at_once))
    vectors = float(KEPT * context * shape.heads * STATISTIC)
    return float(shape.parameters) * size, cache, numbers * size + vectors


def _seconds(
    shape: Shape, passes: list[Pass], machine: Machine, copies: int, held: float
) -> tuple[float, float]:
    """(at least, at most): workers share what can be shared, the longest first; what can't is done
    once."""
    found = []
    compared = machine.products(comparing(shape.heads, shape.layers, shape.d_head))
    for end in (0, 1):
        alone, units = 0.0, []
        for p in passes:
            one = machine.forward(shape, p.tokens, p.watched)[end]
            if p.steps:
                one += p.steps * machine.step(shape, p.tokens, held)[end]
            if not p.unit:
                alone += one * p.rows
            elif p.what == EVIDENCE:  # in one piece
                units.append(one * p.rows + compared[end])
            else:
                units += [one] * p.rows
        found.append(alone + _shared(units, copies))
    return found[0], found[1]


def _shared(units: list[float], copies: int) -> float:
    """How long workers take that take the longest unit left, each as it gets free."""
    busy = [0.0] * copies
    for unit in sorted(units, reverse=True):
        i = busy.index(min(busy))
        busy[i] += unit
    return max(busy)
