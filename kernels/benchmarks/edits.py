"""Whole-model cost of steering attention: one forward under each edit against the plain SDPA
forward.

    python kernels/benchmarks/edits.py --out kernels/benchmarks/results/cpu_edits.json

Same weights, same inputs, one forward each, rounds interleaved, medians; every edit acts in all
heads of all layers. The share of attention is the time inside the attention calls of the plain
forward over that forward's time. Extra memory is the peak resident size during the forward minus
the size before it, less the plain forward's (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from model import _cpu, peak, random_llama, timed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import interp
from interp.errors import UnknownNameError
from interp_hooks import hook
from interp_hooks.model import HookedModel

BARS = {"zero_tuning": 1.15, "scale_tokens": 1.15, "scale_heads": 1.15, "act": 2.5}


def edits(model: HookedModel, length: int) -> dict[str, Any]:
    """name → edit, of those that this version has."""
    spread = [i * length // 16 for i in range(16)]  # 16 keys, each a span of its own
    made: dict[str, Callable[[Any], Any]] = {
        "zero_tuning": lambda edit: edit(2.0),
        "scale_tokens": lambda edit: edit((1, 17), 2.0),
        "scale_tokens, 16 apart": lambda edit: edit(spread, 2.0),
        "scale_heads": lambda edit: edit(dict.fromkeys(model.heads, 1.5)),
        "act": lambda edit: edit(),
        "move_mass": lambda edit: edit("initial", spread[1:], 0.5),
    }
    found = {}
    for name, make in made.items():
        try:
            found[name] = make(interp.edits.registry.get(name.partition(",")[0]))
        except UnknownNameError:
            continue
    return found


@contextmanager
def attention_timed(seconds: list[float]) -> Iterator[None]:
    """Adds the time of every SDPA attention call to `seconds[0]`."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = plain(*args, **kwargs)
        seconds[0] += time.perf_counter() - start
        return result

    ALL_ATTENTION_FUNCTIONS["sdpa"] = run
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


@torch.no_grad()
def measure(name: str, module: Any, length: int, rounds: int) -> dict[str, Any]:
    model = hook(module, name="benchmark")
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, module.config.vocab_size, (1, length), generator=generator)

    def plain() -> Any:
        return module(ids, use_cache=False, logits_to_keep=1)

    def edited(edit: Any) -> Callable[[], Any]:
        def run() -> Any:
            with model.edit(edit):
                return plain()

        return run

    chosen = edits(model, length)
    runs = {"plain": plain, **{key: edited(edit) for key, edit in chosen.items()}}
    memory = {key: peak(run) for key, run in runs.items()}  # warms up too
    times: dict[str, list[float]] = {key: [] for key in runs}
    shares = []
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(timed(run))
        inside = [0.0]
        with attention_timed(inside):
            whole = timed(plain)
        shares.append(inside[0] / whole)
    base = statistics.median(times["plain"])
    row: dict[str, Any] = dict(
        model=name, length=length,
        plain=dict(seconds=round(base, 4), extra_mb=round(memory["plain"], 1)),
        attention_share=round(statistics.median(shares), 3), act_sinks=_sinks(model, ids), edits=[],
    )  # fmt: skip
    for key, edit in chosen.items():
        ratio, bar = statistics.median(times[key]) / base, BARS.get(key.partition(",")[0])
        row["edits"].append(
            dict(
                edit=key,
                seconds=round(statistics.median(times[key]), 4),
                ratio=round(ratio, 2),
                bar=bar,
                met=None if bar is None else round(ratio, 2) <= bar,
                extra_mb=round(memory[key] - memory["plain"], 1),
                route=_route(model, edit, length),
            )
        )
    print(json.dumps(row), flush=True)
    return row


def _sinks(model: HookedModel, ids: torch.Tensor) -> float:
    """Keys a head that ACT calms here, on average (α = 5, all heads)."""
    with model.observe("received") as seen:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    n = ids.shape[1]
    counts = [
        (seen[layer].received[..., 1:] > 5 / n).sum(-1).float().mean()
        for layer in range(model.n_layers)
    ]
    return round(float(torch.stack(counts).mean()), 2)


def _route(model: HookedModel, edit: Any, length: int) -> str:
    """The first layer's line of `explain`."""
    return model.explain(edit, tokens=length).splitlines()[0].partition(": ")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="kernels/benchmarks/results/cpu_edits.json")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {
        "pocket-llama": interp.load("llama").module,
        "random Llama, width 512": random_llama(),
    }
    rows = [
        measure(name, module, arguments.length, arguments.rounds) for name, module in models.items()
    ]
    result = dict(
        what=__doc__.split("\n\n")[2].replace("\n", " ").strip(),
        machine=f"{_cpu()}, {arguments.threads} threads",
        date=time.strftime("%Y-%m-%d"),
        load=round(os.getloadavg()[0], 1),
        rounds=arguments.rounds,
        versions={p: version(p) for p in ("torch", "transformers", "interp")},
        dtype="float32",
        rows=rows,
    )
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
