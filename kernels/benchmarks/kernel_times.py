"""Times of each kernel on a GPU, beside the vendors', FlexAttention's and the exact emulations', in
the same run.

    python kernels/benchmarks/kernel_times.py [--lengths 32768,131072,8192] [--only NAME] [--again]
    [--tune]

A row is written when it is measured; the same command goes on where it stopped. --tune times
configurations of the kernels instead. (Not called kernels.py: transformers would take it for the
package of that name.)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from kernel_flex import flex_columns, flex_redistribution, flex_run
from kernel_inputs import (
    CUDNN,
    EAGER_LENGTH,
    FLASH,
    GROUPS,
    PLAIN,
    TOPK,
    Case,
    Inputs,
    Run,
    Shape,
)
from kernel_others import (
    eager_run,
    entropy_emulation,
    sdpa_run,
    transposed_flash,
    vendor_state_run,
)
from kernel_ours import (
    act_run,
    decode_run,
    prefill_topk_run,
    received_run,
    scattered_run,
    scattered_topk_run,
    spans_run,
    specialised_run,
    statistics_run,
)
from record import BANDWIDTH, NO_GPU, Record, Row, planned
from torch.nn.attention import SDPBackend

from interp_kernels.fused import configs, decode_launch, plans, specialised
from interp_kernels.fused import received as received_module
from interp_kernels.fused.forward import NAMES

WHAT = (
    "Causal prefill of one sequence, 32 query and 8 key-value heads of dimension 128, bf16, random "
    "data in a model's "
    "layout (batch, tokens, heads, dim). Every row is first checked on sampled rows and columns "
    "against float64, its "
    "outputs' memory poisoned with NaN before; then timed by CUDA events with the cache flushed, "
    "the medians of two "
    "rounds. floor_ms is the larger of FLOPs and bytes at the ceilings, which are what a large "
    "bf16 product and a copy "
    "reach. Decode steps are replayed as CUDA graphs over several caches; their ratio is the share "
    "of the bandwidth."
)
LENGTHS = (32768, 131072, EAGER_LENGTH)


EVERY = LENGTHS
SHORT = (EAGER_LENGTH,)


def beside(length: int) -> tuple[tuple[int, int, int], ...]:
    """The initial token and a span of up to 1,024 keys, a quarter of the way in."""
    return (0, 1, 1), (length // 4, length // 4 + min(1024, length // 8), 1)


CASES: tuple[Case, ...] = (
    Case(CUDNN, partial(sdpa_run, SDPBackend.CUDNN_ATTENTION), lengths=EVERY),
    Case(PLAIN, partial(statistics_run, ()), CUDNN, 1.45, 1.15, lengths=EVERY),
    Case(
        "forward with all row statistics",
        partial(statistics_run, NAMES),
        CUDNN,
        1.67,
        1.25,
        lengths=EVERY,
    ),
    Case("received alone", partial(received_run, 1), PLAIN, 0.8, 0.6, lengths=EVERY),
    Case(
        "vendor-route edit: initial token",
        partial(spans_run, lambda n: ((0, 1, 1),)),
        CUDNN,
        1.10,
        1.03,
    ),
    Case(
        "vendor-route edit: initial token and a span", partial(spans_run, beside), CUDNN, 1.10, 1.03
    ),
    *(
        Case(f"single-pass edit: {n} sinks known", partial(scattered_run, n), PLAIN, 1.15, 1.05)
        for n in (4, 64, 1024)
    ),
    Case("ACT exact, with its sink search", partial(act_run, 1), CUDNN, 3.8, 2.6),
    Case("ACT, 1 in 8 query blocks sampled", partial(act_run, 8), CUDNN, 2.2, 1.5),
    Case(
        "decode with edit and top-k",
        partial(decode_run, True, TOPK, False),
        BANDWIDTH,
        0.6,
        0.85,
        bar_lengths=(32768,),
    ),
    Case(
        "decode with edit and top-k, dispatched", partial(decode_run, True, TOPK, True), BANDWIDTH
    ),
    Case("decode with top-k", partial(decode_run, False, TOPK, False), BANDWIDTH),
    Case("decode", partial(decode_run, False, 0, False), BANDWIDTH),
    Case("top-k of the last 64 queries", partial(prefill_topk_run, 64), PLAIN),
    Case("top-k of 64 chosen queries", partial(scattered_topk_run, 64), PLAIN),
    Case("forward with entropy", partial(statistics_run, ("entropy",)), CUDNN),
    Case("forward with max and arg-max", partial(statistics_run, ("max", "argmax")), CUDNN),
    Case(
        "forward with distance and capped distance",
        partial(statistics_run, ("distance", "capped_distance")),
        CUDNN,
    ),
    Case("forward with 16 group masses", partial(statistics_run, ("group_mass",)), CUDNN),
    Case("received from 1 in 8 query blocks", partial(received_run, 8), PLAIN),
    *(
        Case(f"{what}, warps specialised, {c.cols} keys", partial(specialised_run, c, names), CUDNN)
        for what, names in (("plain forward", ()), ("entropy, max, arg-max", specialised.NAMES))
        for c in configs.SPECIALISED
    ),
    Case("FlashAttention", partial(sdpa_run, SDPBackend.FLASH_ATTENTION), CUDNN, lengths=EVERY),
    Case("cuDNN with its log-sum-exp", partial(vendor_state_run, CUDNN), CUDNN),
    Case("FlashAttention with its log-sum-exp", partial(vendor_state_run, FLASH), CUDNN),
    Case("emulation: output and entropy by V := K, vendor", entropy_emulation, CUDNN),
    Case("emulation: column sums by transposed FlashAttention", transposed_flash, PLAIN),
    Case("FlexAttention", partial(flex_run, "plain"), CUDNN),
    Case("FlexAttention with a bias on 64 keys a head", partial(flex_run, "bias"), CUDNN),
    Case("FlexAttention with lse and max_scores", partial(flex_run, "aux"), CUDNN),
    Case("emulation: redistribution by two FlexAttention calls", flex_redistribution, CUDNN),
    Case("emulation: column sums by transposed FlexAttention", flex_columns, PLAIN),
    Case("eager", partial(eager_run, ()), CUDNN, lengths=SHORT),
    Case(
        "eager with entropy, max, arg-max and received",
        partial(eager_run, ("all",)),
        CUDNN,
        lengths=SHORT,
    ),
)


def plan(lengths: Sequence[int], smoke: bool) -> list[Row]:
    """Rows in the order of measuring."""
    rows = []
    for length in lengths:
        for case in CASES:
            if smoke or length in case.lengths or length not in LENGTHS:
                barred = smoke or length in case.bar_lengths
                bar, goal = (case.bar, case.goal) if barred else (None, None)
                rows.append(planned(case.name, length, case.of, bar, goal))
    return rows


def poison(x: Inputs) -> None:
    """NaN into memory that the allocator will hand out next, so that what a kernel leaves unwritten
    shows."""
    waste = [torch.full_like(x.q, torch.nan) for _ in range(2)]
    waste += [
        torch.full((x.shape.heads, x.length, n), torch.nan, device=x.device)
        for n in (1, 1, 1, 1, 1, GROUPS)
    ]
    del waste


def clock(run: Run, device: torch.device, seconds: float = 1.0) -> tuple[list[float], str]:
    """(milliseconds of two rounds, note)."""
    if not run.graph or device.type != "cuda":
        return record.timed(run.calls[0], device, seconds), run.note
    try:
        return record.timed_graph(
            run.calls, device, repeats=8 if len(run.calls) > 1 else 1
        ), run.note
    except RuntimeError as reason:
        torch.cuda.synchronize(device)
        note = (
            f"{run.note}; not capturable ({str(reason).splitlines()[0][:80]}), so with the gaps "
            "between launches"
        )
        return record.timed(run.calls[0], device, seconds, flush=True), note.lstrip("; ")


@torch.no_grad()
def measure(case: Case, x: Inputs, found: Row, floors: tuple[float, float]) -> None:
    """Check, time, and put down what was found."""
    run = case.make(x)
    poison(x)
    start = time.perf_counter()
    result = run.calls[0]()
    times = [1e3 * (time.perf_counter() - start)]  # all there is in a smoke test
    if run.check is not None:
        worst = run.check(result)
        if not worst <= 1:
            raise AssertionError(f"wrong: {worst:.3g} times the allowed error against float64")
        found["error_share"] = round(worst, 4)
    del result
    if x.device.type == "cuda":
        times, run.note = clock(run, x.device)
    found |= record.figures(times)
    found["floor_ms"] = round(1e3 * max(run.flops / floors[0], run.bytes / floors[1]), 4)
    if run.note:
        found["note"] = run.note


def wanted(name: str, only: str) -> bool:
    """Whether the name contains one of the alternatives, as a|b."""
    return any(one in name for one in only.split("|"))


def measure_all(
    book: Record,
    lengths: Sequence[int],
    only: str,
    shape: Shape,
    device: torch.device,
    floors: tuple[float, float],
    end: float,
) -> int:
    """Measure what is missing until the clock says `end`; how many rows are left."""
    left = 0
    for length in lengths:
        todo = [
            c
            for c in CASES
            if (c.name, length) in book.rows and wanted(c.name, only) and book.todo(c.name, length)
        ]
        x = None
        for case in todo:
            if time.time() > end:
                left += 1
                continue
            if x is None:
                x = Inputs(length, shape, device)
            with record.recorded(book, case.name, length) as found:
                measure(case, x, found, floors)
        del x
    return left


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module's function replaced inside, and no plan of a decode step kept that was made with
    another."""
    before = getattr(module, name)
    setattr(module, name, value)
    plans.forget()
    try:
        yield
    finally:
        setattr(module, name, before)
        plans.forget()


@dataclass(frozen=True)
class Tuning:
    """A kernel, its candidate configurations, and how one is put in place."""

    name: str
    run: Callable[[Inputs], Run]
    module: Any
    function: str
    candidates: Sequence[Any] = field(default_factory=tuple)


def tunings(smoke: bool) -> list[Tuning]:
    columns = received_module.Config
    tiles = [(128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4)]
    wide = [configs.Config(*tile, stages) for tile in tiles for stages in (2, 3, 4)]
    keyed = [
        columns(*shape)
        for shape in [(64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3)]
    ]
    keyed += [
        columns(*shape)
        for shape in [(128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (64, 128, 8, 3)]
    ]
    keyed += [
        columns(*shape)
        for shape in [(64, 128, 4, 3), (128, 32, 4, 3), (128, 32, 4, 4), (256, 64, 8, 2)]
    ]
    split = [(16, block, w, s) for block in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)]
    if smoke:
        wide, keyed, split = (
            [configs.Config(32, 32, 1, 1)],
            [columns(32, 32, 1, 1, 1)],
            [(16, 32, 4, 2)],
        )
    return [
        Tuning("forward plain", partial(statistics_run, ()), configs, "forward", wide),
        Tuning("forward all statistics", partial(statistics_run, NAMES), configs, "forward", wide),
        Tuning("received", partial(received_run, 1), received_module, "config", keyed),
        Tuning("decode", partial(decode_run, True, TOPK, False), decode_launch, "config", split),
    ]


@torch.no_grad()
def tune(
    book: Record,
    length: int,
    only: str,
    shape: Shape,
    device: torch.device,
    smoke: bool,
    end: float,
) -> int:
    """Time every candidate of every kernel; "tuning" of the result says which was best. How many
    are left."""
    left = 0
    made = book.extra.setdefault("tuning", {})
    x = Inputs(length, shape, device)
    for tuning in tunings(smoke):
        if only not in tuning.name:
            continue
        entry = made.setdefault(
            f"{tuning.name}, {length}", {"best": None, "sources": book.sources, "tried": []}
        )
        if entry["sources"] != book.sources:
            entry |= {"best": None, "sources": book.sources, "tried": []}
        for candidate in tuning.candidates:
            named = candidate if isinstance(candidate, tuple) else tuple(asdict(candidate).values())
            if any(tuple(t["config"]) == named for t in entry["tried"]):
                continue
            if time.time() > end:
                left += 1
                continue
            tried: Row = {"config": list(named)}
            entry["tried"].append(tried)
            tried["error"] = "did not end before the run was stopped"
            book.write()
            with replaced(
                tuning.module, tuning.function, lambda *_, candidate=candidate: candidate
            ):
                try:
                    run = tuning.run(x)
                    worst = run.check(run.calls[0]()) if run.check is not None else 0.0
                    if not worst <= 1:
                        raise AssertionError(f"wrong: {worst:.3g} times the allowed error")
                    times, _ = clock(run, device, seconds=0.3)
                    tried.pop("error")
                    tried |= record.figures(times)
                except Exception as reason:  # too large for the device, or wrong
                    tried["error"] = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
            timed = [t for t in entry["tried"] if "ms" in t]
            entry["best"] = min(timed, key=lambda t: t["ms"])["config"] if timed else None
            book.write()
            record.tidy()
            print(tuning.name, named, tried.get("ms", tried.get("error")), flush=True)
    return left


def header(gpu: str, shape: Shape | None, floors: tuple[float, float], measured: bool) -> Row:
    """All of a result but the rows."""
    return dict(
        what=WHAT,
        gpu=gpu,
        date=time.strftime("%Y-%m-%d") if measured else record.NOT_MEASURED,
        revision=record.revision() if measured else None,
        versions=record.versions() if measured else {},
        shape={k: v if isinstance(v, int) else str(v) for k, v in asdict(shape or Shape()).items()},
        ceilings=dict(tflops=floors[0] / 1e12, tb_s=floors[1] / 1e12),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument(
        "--only", default="", help="only rows whose name contains this (a|b: either)"
    )
    parser.add_argument(
        "--out", help="the result file (default: in $OUT, else in results/ beside this)"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure also what is measured already"
    )
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="start no further row after so long"
    )
    parser.add_argument(
        "--tune", action="store_true", help="time configurations of the kernels instead, at 32k"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="everything once, tiny; runs without a GPU"
    )
    parser.add_argument(
        "--plan", action="store_true", help="write the rows with no figure, and measure nothing"
    )
    arguments = parser.parse_args()
    lengths = [int(n) for n in arguments.lengths.split(",")]
    if arguments.plan:
        head = header("NVIDIA H200", None, record.CEILINGS["h200"], False)
        text = record.dumps({**head, "rows": plan(lengths, False)})
        print(text, end="") if not arguments.out else Path(arguments.out).write_text(
            text, encoding="utf-8"
        )
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not arguments.smoke:
        print(NO_GPU, file=sys.stderr)
        raise SystemExit(2)
    shape = Shape()
    if arguments.smoke:
        lengths = [80]
        shape = Shape(2, 1, 16, torch.bfloat16 if device.type == "cuda" else torch.float32)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (smoke test)"
    path, earlier = record.place(
        "kernels_smoke" if arguments.smoke else "kernels", device, arguments.out
    )
    floors = record.ceilings(device)
    head, rows = header(gpu, shape, floors, True), plan(lengths, arguments.smoke)
    book = Record(path, head, rows, record.digest(__file__), earlier, arguments.again)
    end = time.time() + 60 * arguments.minutes
    if arguments.tune:
        left = tune(
            book, min(lengths[0], 32768), arguments.only, shape, device, arguments.smoke, end
        )
    else:
        left = measure_all(book, lengths, arguments.only, shape, device, floors, end)
    book.write()
    print(record.summary(book), path)
    if left:
        print(f"{left} left; the same command goes on.")


if __name__ == "__main__":
    main()
