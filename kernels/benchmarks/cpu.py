"""What the statistics cost on a CPU: a long text in chunks, and where the time of a pass goes.

    python kernels/benchmarks/cpu.py long MODEL --tokens 32768 --chunk 2048
    python kernels/benchmarks/cpu.py profile MODEL --tokens 2048
    python kernels/benchmarks/cpu.py times MODEL --tokens 2048 --runs 7

Each prints a JSON object, and writes it where `--out` says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Scores of running text, each by other statistics.
FULL = ("sink", "entropy", "max_prob", "distance", "waad", "local", "later_sink", "fai")
CHEAP = ("sink", "sink_rate")
#: Tokens of English that are shipped, and more.
SHIPPED = 16_000
#: What an operation is part of, by how its name begins; the first that fits.
KINDS = (
    ("linear layers", ("aten::linear", "aten::addmm", "aten::mm")),
    ("SDPA", ("aten::_scaled_dot_product", "aten::scaled_dot_product", "aten::_flash")),
    ("products of statistics", ("aten::bmm", "aten::matmul", "aten::einsum")),
    ("exp", ("aten::exp", "aten::special")),
    ("maxima", ("aten::amax", "aten::max", "aten::topk", "aten::sort", "aten::argmax")),
    ("copies and casts", ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero")),
    ("other element-wise work", ("aten::",)),
)


def about() -> dict[str, Any]:
    """Where and when."""
    return dict(
        date=datetime.date.today().isoformat(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def loaded(folder: Path, tokens: int, dtype: str) -> Any:
    """The model, its rotary positions scaled by YaRN where it has fewer than `tokens`."""
    import transformers

    import interp

    config = transformers.AutoConfig.from_pretrained(folder)
    limit = config.max_position_embeddings
    if tokens > limit:
        base = config.rope_parameters["rope_theta"]
        config.rope_parameters = dict(
            rope_type="yarn",
            rope_theta=base,
            factor=tokens / limit,
            original_max_position_embeddings=limit,
        )
        config.max_position_embeddings = tokens
    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=getattr(torch, dtype)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return interp.load(module.eval(), tokenizer=tokenizer)


def peak() -> float:
    """Most memory that the process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def long_text(args: argparse.Namespace) -> dict[str, Any]:
    """A scan of one long text in chunks: seconds, and the memory of the process."""
    import interp
    from interp.inputs.text import rows_of_text

    model = loaded(args.model, args.tokens, args.dtype)
    before = peak()
    text = None
    if args.tokens > SHIPPED:  # the English that is shipped, from the start again where it ends
        text = model.tokenizer.decode(rows_of_text(model.tokenizer, None, SHIPPED, 1, 0)[0])
    plan = interp.plan_scan(
        model, list(args.scores), args.tokens, samples=1, text=text, chunk=args.chunk or None
    )
    started = time.perf_counter()
    plan.run()
    seconds = time.perf_counter() - started
    return dict(
        what="long",
        tokens=args.tokens,
        chunk=args.chunk,
        dtype=args.dtype,
        scores=list(args.scores),
        seconds=round(seconds, 1),
        planned_seconds=round(plan.seconds, 1),
        gigabytes=round(peak(), 2),
        gigabytes_of_the_model=round(before, 2),
        rope=model.module.config.rope_parameters,
        **about(),
    )


def kind_of(name: str) -> str:
    return next(kind for kind, starts in KINDS if name.startswith(starts))


def profile(args: argparse.Namespace) -> dict[str, Any]:
    """Where the time of a forward goes: plain, with a few statistics and with all, by kinds of
    operations; self time of the profiler, median of the runs."""
    found: dict[str, Any] = {}
    runs = forwards(args)
    with torch.no_grad():
        for label, run in runs.items():
            run()
            samples = [profiled(run) for _ in range(args.runs)]
            kinds = sorted({kind for one in samples for kind in one})
            middle = {k: sorted(s.get(k, 0.0) for s in samples)[len(samples) // 2] for k in kinds}
            found[label] = {k: round(v, 3) for k, v in middle.items()}
            found[label]["all"] = round(sum(middle.values()), 3)
    return dict(what="profile", tokens=args.tokens, dtype=args.dtype, seconds=found, **about())


def times(args: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds of a forward, plain, with a few statistics and with all, in turns; and what the
    statistics cost as a ratio: the median over rounds, with the lowest and the highest."""
    runs = forwards(args)
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    load = os.getloadavg()[0]
    with torch.no_grad():
        for round_ in range(args.runs + 1):  # the first is thrown away
            for label, run in runs.items():
                started = time.perf_counter()
                run()
                if round_:
                    seconds[label].append(time.perf_counter() - started)
    ratios = {}
    for label in ("cheap", "full"):
        each = [a / b for a, b in zip(seconds[label], seconds["plain"], strict=True)]
        ratios[label] = [round(x, 3) for x in (statistics.median(each), min(each), max(each))]
    return dict(
        what="times",
        tokens=args.tokens,
        dtype=args.dtype,
        seconds={k: round(statistics.median(v), 3) for k, v in seconds.items()},
        ratios=ratios,
        runs=args.runs,
        load_before=round(load, 1),
        **about(),
    )


def forwards(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """A forward of random tokens, by what is asked of it."""
    from interp.scores.catalogue import select

    model = loaded(args.model, args.tokens, args.dtype)
    ids = torch.randint(10, 1000, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], Any]] = {"plain": lambda: model.module(ids, logits_to_keep=1)}
    for label, names in (("cheap", CHEAP), ("full", FULL)):
        runs[label] = watching(model, ids, select(list(names)))
    return runs


def watching(model: Any, ids: torch.Tensor, scores: Any) -> Callable[[], Any]:
    """A forward under the question of these scores, which are measured."""
    from interp.probes.probe import ProbeBatch
    from interp_hooks import Question

    batch = ProbeBatch(ids)
    question = Question()
    for score in scores:
        question = question | score.ask(batch)

    def run() -> None:
        with model.watch(question, lambda stats: [s.measure(stats, batch) for s in scores]):
            model.module(ids, logits_to_keep=1)

    return run


def profiled(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by kind of operation, of one run."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        run()
    sums: dict[str, float] = {}
    for event in found.key_averages():
        if event.key.startswith("aten::"):
            kind = kind_of(event.key)
            sums[kind] = sums.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    return sums


def written(result: dict[str, Any], out: Path | None) -> None:
    """Prints a result, and writes it where `out` says."""
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["long", "profile", "times"])
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=0, help="tokens at a time; 0: all at once")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scores", nargs="*", default=list(FULL))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    written({"long": long_text, "profile": profile, "times": times}[args.what](args), args.out)


if __name__ == "__main__":
    main()
