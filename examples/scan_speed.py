"""What a scan costs beside the forwards it needs, and beside eager attention's matrices.

    python examples/scan_speed.py --threads 2 --out examples/scan_speed.json

Each round times, one after the other, the default scan's forwards on the untouched model (the very
inputs, batches and decode steps that the scan gave it, transformers' sdpa), the scan itself, and
the same two for the scores of running text alone, whose forwards eager attention then makes with
`output_attentions=True`, the matrices dropped after each. Figures are medians over rounds, ratios
medians of each round's own ratio, so that a slow minute of the machine falls on both. `plan` is
what comes before a scan: making the inputs and a few short forwards for the time it announces. CPU
seconds are of the whole process, all threads together. Peak memory is a process of its own for each
length, the default scan of one sample.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import interp
from interp_hooks import HookedModel

#: a scan may take so many times its forwards
BAR = 1.6
#: and keep so many gigabytes resident at `LONG` tokens
BAR_MEMORY = 2.5
LONG = 8192


@dataclass
class Forwards:
    """The forwards that a piece of work made, in order, to be made again.

    A cache is not kept: `cached` says that a forward went on from the one before.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    cached: list[bool] = field(default_factory=list)

    @contextmanager
    def recording(self, model: HookedModel) -> Iterator[None]:
        """Note the forwards of the block."""

        def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            assert not args, "HookedModel names its inputs"
            inputs = dict(kwargs)
            self.cached.append(inputs.pop("past_key_values", None) is not None)
            self.calls.append(inputs)

        handle = model.module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @property
    def tokens(self) -> int:
        return sum(inputs["input_ids"].numel() for inputs in self.calls)

    @torch.no_grad()
    def run(self, module: Any, **more: Any) -> None:
        """Make them on a model, untouched."""
        cache = None
        for inputs, cached in zip(self.calls, self.cached, strict=True):
            past = dict(past_key_values=cache) if cached else {}
            cache = getattr(module(**inputs, **past, **more), "past_key_values", None)


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the clock, and of all threads together."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return dict(seconds=time.perf_counter() - clock, cpu_seconds=time.process_time() - cpu)


def measured(model: HookedModel, context: int, samples: int, rounds: int) -> dict[str, Any]:
    """Every part's times, a list over rounds."""

    def plan_of(scores: Any) -> Any:
        return interp.plan_scan(model, scores, context=context, samples=samples)

    whole = plan_of("default")
    of_text = plan_of([s.name for s in whole.scores if s.probe == "text"])
    forwards = {"default": Forwards(), "text": Forwards()}
    for name, plan in (("default", whole), ("text", of_text)):
        with forwards[name].recording(model):
            plan.run()  # the first run warms up, too
    parts: dict[str, list[dict[str, float]]] = {}

    def add(name: str, run: Callable[[], Any]) -> None:
        parts.setdefault(name, []).append(timed(run))

    module = model.module
    for i in range(rounds):
        print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
        add("plan", lambda: plan_of("default"))
        add("default: plain", lambda: forwards["default"].run(module))
        add("default: scan", whole.run)
        add("text: plain", lambda: forwards["text"].run(module))
        add("text: scan", of_text.run)
        before = module.config._attn_implementation
        module.set_attn_implementation("eager")
        try:
            add("text: eager", lambda: forwards["text"].run(module, output_attentions=True))
        finally:
            module.set_attn_implementation(before)
    counts = {
        name: dict(forwards=len(made.calls), decode_steps=sum(made.cached), tokens=made.tokens)
        for name, made in forwards.items()
    }
    return dict(plan=[" | ".join(row) for row in whole.rows], forwards=counts, parts=summary(parts))


def summary(parts: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row a part: medians, the rounds themselves, and the ratio to its plain forwards."""
    rows = []
    for name, times in parts.items():
        row: dict[str, Any] = dict(part=name)
        for unit in ("seconds", "cpu_seconds"):
            row[unit] = round(statistics.median(t[unit] for t in times), 2)
        row["rounds"] = [{k: round(v, 2) for k, v in t.items()} for t in times]
        group = name.partition(":")[0]
        plain = parts.get(f"{group}: plain")
        if plain is not None and not name.endswith("plain"):
            for unit, key in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
                ratios = [t[unit] / p[unit] for t, p in zip(times, plain, strict=True)]
                row[key] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def resident(model: str, context: int) -> dict[str, Any]:
    """Peak gigabytes of a process with the model loaded, and after a default scan of a sample."""
    command = [sys.executable, __file__, "--model", model, "--memory-of", str(context)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(model: str, context: int) -> dict[str, Any]:
    """The same, in this process."""

    def peak() -> float:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(kilobytes / (1e9 if sys.platform == "darwin" else 1e6), 3)

    loaded = interp.load(model)
    start = peak()
    interp.scan_heads(loaded, context=context, samples=1, progress=False)
    return dict(context=context, loaded_gb=start, peak_gb=peak())


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} logical cores"


def table(result: dict[str, Any]) -> str:
    lines = ["| part | seconds | of its plain forwards | CPU seconds |", "|---|---|---|---|"]
    for row in result["parts"]:
        ratio = f"{row['ratio']:.2f} ×" if "ratio" in row else ""
        lines.append(
            f"| {row['part']} | {row['seconds']:.1f} | {ratio} | {row['cpu_seconds']:.1f} |"
        )
    lines += [
        f"\nAt {m['context']:,} tokens {m['peak_gb']:.2f} GB at most "
        f"({m['loaded_gb']:.2f} with the model loaded)."
        for m in result["memory"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="smollm2-135m", help="anything interp.load takes")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--long", type=int, default=LONG, help="tokens for the memory; 0 for none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory_of(options.model, options.memory_of)))
        return
    model = interp.load(options.model)
    result: dict[str, Any] = dict(
        what=" ".join(str(__doc__).split("\n\n")[-1].split()),
        model=model.name,
        hardware=hardware(),
        threads=options.threads,
        date=time.strftime("%Y-%m-%d"),
        versions={name: version(name) for name in ("torch", "transformers")},
        context=options.context,
        samples=options.samples,
        bar=BAR,
        bar_gigabytes=BAR_MEMORY,
        **measured(model, options.context, options.samples, options.rounds),
        memory=[
            resident(options.model, n) for n in dict.fromkeys([options.context, options.long]) if n
        ],
    )
    print(table(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
