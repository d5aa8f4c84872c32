"""Continue-tunes pocket-llama as a mixture of heads (MoH), beside what would refute a router's worth.

    python examples/train_moh.py --out examples/train_moh.json

Half of each layer's heads are shared, a quarter is kept of the rest by a router. Every way of
tuning has the same batches, steps and learning rate: without any router, under `HeadGate` (MoH's own
router of LLaMA3: the longest queries), under a learned router with soft and with straight gates, and
with as many routed heads that a draw has fixed. Loss on held-out rows of the same documents,
intervals paired by row over all seeds. Nothing was tuned on the held-out rows. With
--page docs/results.md the table goes between that page's markers.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published import change, interval, parser, publish, stamp, where
from torch.nn.functional import cross_entropy
from train_pocket_llama import CURRICULUM, Language

import interp
from interp.edits import HeadGate, ScaleHeads, save
from interp.nn import MixtureOfHeads
from interp.support.statistics import RESAMPLES
from interp_hooks import HookedModel, hook

BEGIN, END = "<!-- mixture of heads: begin -->", "<!-- mixture of heads: end -->"
ROWS, LENGTH, HELD_OUT = 16, 128, 128
#: learning rates of the model and of routers, and the load-balance loss's factor
RATE, ROUTER_RATE, BALANCE = 3e-4, 3e-3, 0.01
MIXTURE = next(mixture for name, *_, mixture in CURRICULUM if name == "short")
WAYS = (
    "no router",
    "HeadGate",
    "learned router, soft",
    "learned router, straight",
    "fixed heads, drawn",
)
#: shown as changes from
BASE = "the model itself"


def fixed(model: HookedModel, seed: int) -> ScaleHeads:
    """As many routed heads as the routers keep, drawn once for each layer and the same for all
    tokens: the others are 0."""
    rng = np.random.default_rng([seed, 11])
    shared, kept = HeadGate().counts(model.n_heads)
    off = {
        (layer, int(head)): 0.0
        for layer in range(model.n_layers)
        for head in rng.permutation(np.arange(shared, model.n_heads))[kept:]
    }
    return ScaleHeads(off)


def losses(model: HookedModel, ids: torch.Tensor) -> torch.Tensor:
    """(rows,): mean loss of each row."""
    logits = model(input_ids=ids).logits[:, :-1]  # (rows, tokens − 1, vocabulary)
    token = cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
    return token.mean(1)


@torch.no_grad()
def held_out(model: HookedModel, corpus: Language, edits: list[Any]) -> list[float]:
    """The loss of each held-out row, which no seed trains on."""
    found: list[float] = []
    with model.edit(*edits) if edits else nullcontext():
        for part in range(HELD_OUT // ROWS):
            ids = corpus.batch(10**6, part, ROWS, LENGTH, MIXTURE)
            found += losses(model, ids).tolist()
    return found


def tuned(
    way: str, start: Any, corpus: Language, steps: int, seed: int
) -> tuple[HookedModel, list[Any]]:
    """The model after so many steps, and the edits that it is evaluated under."""
    model = hook(copy.deepcopy(start), name="pocket-llama")
    model.module.train()
    moh = None
    if way.startswith("learned"):
        moh = MixtureOfHeads(model, straight="straight" in way, seed=seed)
    edits = {"HeadGate": [HeadGate()], "fixed heads, drawn": [fixed(model, seed)]}.get(way, [])
    groups = [dict(params=list(model.module.parameters()), lr=RATE)]
    if moh is not None:
        groups.append(dict(params=list(moh.parameters()), lr=ROUTER_RATE))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        ids = corpus.batch(seed + 1000, step, ROWS, LENGTH, MIXTURE)
        with moh.on(model) if moh else model.edit(*edits) if edits else nullcontext():
            loss = losses(model, ids).mean()
        if moh is not None:
            loss = loss + BALANCE * moh.balance()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.module.parameters(), 1.0)
        optimizer.step()
    model.module.eval()
    return model, [moh.edit()] if moh is not None else edits


def shuffled(edit: Any, seed: int) -> Any:
    """The router with its routed heads' rows in another order: as many heads, the wrong ones."""
    rng = np.random.default_rng([seed, 13])
    shared, _ = HeadGate().counts(edit.weights.shape[1] - 2)
    weights = edit.weights.clone()
    for layer in weights:
        rows = layer[shared:-2]
        layer[shared:-2] = rows[torch.from_numpy(rng.permutation(len(rows)))]
    return type(edit)(weights, edit.keep, edit.shared, edit.straight)


def row_of(values: dict[int, list[float]], base: dict[int, list[float]] | None) -> dict[str, Any]:
    """Mean over seeds and rows, the paired difference from `base`, and its interval: seeds are
    resampled, then rows."""
    table = np.array([values[seed] for seed in values])  # (seeds, rows)
    other = None if base is None else np.array([base[seed] for seed in values])
    shown = table if other is None else table - other
    rng = np.random.default_rng(0)
    draws = [
        shown[rng.integers(0, len(shown), len(shown))][
            :, rng.integers(0, shown.shape[1], shown.shape[1])
        ].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    interval_of = dict(mean=float(shown.mean()), low=float(low), high=float(high), n=shown.size)
    by_seed = [float(m) for m in shown.mean(1)]
    return dict(interval=interval_of, by_seed=by_seed, change=other is not None)


def measure(steps: int, seeds: int, router: Path | None = None) -> dict[str, Any]:
    """Losses before tuning and after it, every way."""
    start = interp.load("llama")
    corpus = Language(start.tokenizer)
    found: dict[str, dict[int, list[float]]] = {}

    def keep(label: str, seed: int, values: list[float]) -> None:
        found.setdefault(label, {})[seed] = values

    began = time.time()
    for seed in range(seeds):
        keep(BASE, seed, held_out(start, corpus, []))
        keep("untuned, HeadGate", seed, held_out(start, corpus, [HeadGate()]))
        keep("untuned, fixed heads, drawn", seed, held_out(start, corpus, [fixed(start, seed)]))
        moh = MixtureOfHeads(start, seed=seed).edit()
        keep("untuned, a router at its start", seed, held_out(start, corpus, [moh]))
        for way in WAYS:
            model, edits = tuned(way, start.module, corpus, steps, seed)
            keep(f"tuned, {way}", seed, held_out(model, corpus, edits))
            if way == "no router":
                for label, edit in (("HeadGate", HeadGate()), ("fixed heads", fixed(model, seed))):
                    keep(f"tuned without, then {label}", seed, held_out(model, corpus, [edit]))
            if way.startswith("learned"):
                wrong = [shuffled(edits[0], seed)]
                keep(f"tuned, {way}, its rows shuffled", seed, held_out(model, corpus, wrong))
            if router is not None and way == "learned router, soft" and seed == 0:
                save(router, edits)
            print(f"seed {seed}: {way} ({time.time() - began:.0f} s)", flush=True)
    rows = {label: row_of(v, None if label == BASE else found[BASE]) for label, v in found.items()}
    pairs = {}
    for way in WAYS[2:4]:
        mine = found[f"tuned, {way}"]
        for other in WAYS:
            if other != way:
                pairs[f"{way} less {other}"] = row_of(mine, found[f"tuned, {other}"])
    return dict(
        steps=steps, seeds=seeds, rows=rows, pairs=pairs, seconds=round(time.time() - began),
        stamp=stamp(),
    )  # fmt: skip


def render_table(result: dict[str, Any]) -> str:
    """Markdown: losses, and the learned routers less the others."""
    lines = ["| | loss, nats a token |", "|---|---|"]
    for label, row in result["rows"].items():
        shown = change(row["interval"], 3)
        if not row["change"]:
            shown = interval(row["interval"], "{:.3f}".format)
        lines.append(f"| {label} | {shown} |")
    lines += ["", "| learned router, less | |", "|---|---|"]
    lines += [f"| {k} | {change(row['interval'], 3)} |" for k, row in result["pairs"].items()]
    about = (
        f"{result['steps']} steps of {ROWS} rows of {LENGTH} tokens, {result['seeds']} seeds, "
        f"{HELD_OUT} held-out rows; {where([result['stamp']])}, {result['seconds']} s "
        "([all numbers](../examples/train_moh.json))."
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    options = parser(__doc__, "train_moh", 80, threads=1)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--router", type=Path, help="where the first soft router goes (JSON)")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.n, arguments.seeds, arguments.router)
    publish(result, render_table(result), arguments, BEGIN, END)


if __name__ == "__main__":
    main()
