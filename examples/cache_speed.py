"""The time of a decoding step over caches of less memory, as ratios to the whole cache.

    python examples/cache_speed.py [--contexts 1024 4096 8192] [--page docs/results.md]

After a text of so many tokens (64 fewer, so that the steps fit) every cache is asked for the same
next tokens, in turns, step by step, so that what else the machine does meets all alike. A step's
ratio is its seconds over those of the whole cache in the same turn; the table has the median over
steps and the middle half.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import published
import torch

import interp
from interp.caches import HeadCache, HeavyHitterCache, SnapCache
from interp.caches.choosing import gate_of
from interp.caches.compress import POOL, RECENT, SINK, WINDOW
from interp.edits import Gate
from interp.inputs.forward import forward
from interp.inputs.text import rows_of_text

MODEL, DTYPE = "smollm2-135m", "bfloat16"
BEGIN, END = "<!-- cache speed: begin -->", "<!-- cache speed: end -->"
BUDGET = 0.25


def caches(model: Any, context: int) -> dict[str, Callable[[], Any] | None]:
    """Caches by name, all but the first of a quarter of the memory at `context` tokens. Which kv
    heads keep everything does not matter to the time, so they are drawn."""
    shape = (model.n_layers, model.sites[0].n_kv_heads)
    drawn = gate_of(np.random.default_rng(0).random(shape), BUDGET, context, SINK, RECENT)
    size = int(BUDGET * context)
    streaming = Gate(0.0, sink=SINK, recent=size - SINK + 1)
    return {
        "whole": None,
        "whole, through this toolkit's cache": partial(HeadCache, model, Gate(1.0)),
        "some kv heads whole, others streaming": partial(HeadCache, model, drawn),
        "streaming in all": partial(HeadCache, model, streaming),
        "SnapKV": partial(SnapCache, model, size, WINDOW, POOL),
        "H2O": partial(HeavyHitterCache, model, size),
    }


def begun(model: Any, make: Callable[[], Any] | None, row: list[int]) -> Any:
    """The cache after the text."""
    ids = torch.tensor([row])
    cache = {} if make is None else dict(past_key_values=make())
    return forward(model, ids, keep=1, use_cache=True, **cache).past_key_values


def measured(model: Any, context: int, steps: int) -> dict[str, Any]:
    """Seconds of a step, whole, and the ratios of the others."""
    row = rows_of_text(model.tokenizer, None, context, 1, 0)[0]
    held = {name: begun(model, make, row) for name, make in caches(model, context).items()}
    seconds: dict[str, list[float]] = {name: [] for name in held}
    load = os.getloadavg()[0]
    for step in range(steps + 2):  # the first two are thrown away
        ids = torch.tensor([[row[step]]])
        for name, cache in held.items():
            started = time.perf_counter()
            forward(model, ids, use_cache=True, past_key_values=cache)
            seconds[name].append(time.perf_counter() - started)
    taken = {name: np.array(each[2:]) for name, each in seconds.items()}
    whole = taken["whole"]
    ratios = {name: np.percentile(t / whole, [50, 25, 75]).round(3) for name, t in taken.items()}
    return dict(
        milliseconds=round(float(np.median(whole)) * 1e3, 1),
        ratios={name: values.tolist() for name, values in ratios.items()},
        megabytes={name: round(size(cache) / 1e6, 1) for name, cache in held.items()},
        steps=steps,
        load_before=round(load, 1),
        **published.stamp(),
    )


def size(cache: Any) -> int:
    """Bytes of keys and values."""
    own = getattr(cache, "nbytes", None)
    if own is None:
        own = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return int(own)


def markdown(result: dict[str, Any]) -> str:
    """A row a cache, a pair of columns a context."""
    contexts = sorted(result["contexts"].items(), key=lambda item: int(item[0]))
    head = "".join(f" {int(c):,} tokens: MB | step |" for c, _ in contexts)
    lines = [f"| cache |{head}", "|---" * (1 + 2 * len(contexts)) + "|"]
    for name in contexts[0][1]["ratios"]:
        line = f"| {name} |"
        for _, part in contexts:
            middle, low, high = part["ratios"][name]
            ratio = f"{part['milliseconds']:.0f} ms"
            if name != "whole":
                ratio = f"{middle:.2f} × [{low:.2f}, {high:.2f}]"
            line += f" {part['megabytes'][name]:.0f} | {ratio} |"
        lines.append(line)
    steps = contexts[0][1]["steps"]
    return "\n".join(
        [
            *lines,
            "",
            f"{MODEL}, {DTYPE}, batch 1; medians of {steps} steps in turns, brackets hold the "
            f"middle half of them; {published.where(part for _, part in contexts)}.",
        ]
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = published.parser(__doc__, "cache_speed", n=48, threads=1)
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096, 8192])
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    settings = dict(model=MODEL, dtype=DTYPE, budget=BUDGET)
    result = published.earlier(options, **settings) or dict(**settings, contexts={})
    model = interp.load(MODEL, dtype=DTYPE)
    with torch.no_grad():
        for context in options.contexts:
            result["contexts"][str(context)] = measured(model, context - 64, options.n)
    published.publish(result, markdown(result), options, BEGIN, END)


if __name__ == "__main__":
    main()
