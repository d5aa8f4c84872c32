"""Caches of equal memory on SmolLM2-135M-Instruct: kv heads chosen by retrieval, random ones,
streaming everywhere and SnapKV, beside the whole cache; and sparse layouts as edits.

    python examples/cache_table.py [--n 24] [--context 1024] [--budgets 0.5 0.25]
        [--page docs/results.md]

A context and a budget at a time goes into the JSON beside those that are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import published
import torch

import interp
from interp.caches.compress import RECENT, SINK
from interp.edits import HierarchicalTopk, Sharded, Streaming
from interp.evaluation.loss import continuation_loss, rows_for_loss

MODEL, DTYPE = "smollm2-135m", "bfloat16"
BEGIN, END = "<!-- caches: begin -->", "<!-- caches: end -->"
#: samples of the scan that chooses
SAMPLES = 16


def compressed(model: Any, atlas: Any, budget: float, context: int, n: int, seed: int) -> Any:
    """Rows of `interp.caches.compress`, and what is kept."""
    found = interp.caches.compress(
        model, budget, context=context, atlas=atlas, n=n, seed=seed, progress=False
    )
    rows = json.loads(found.frame.to_json(orient="records"))
    return dict(rows=rows, kept=found.phrase)


def layouts(context: int) -> dict[str, Any]:
    """Sparse layouts by name, all of about a third to a quarter of the keys."""
    return {
        "S2: one block of 3 a kv head, 64 recent": Sharded(3, 64, 64),
        f"HiP: {context // 4} keys, 4 first, 64 recent": HierarchicalTopk(context // 4),
        f"streaming: 4 first, {context // 4} recent": Streaming(4, context // 4),
    }


def edited(model: Any, context: int, n: int, seed: int) -> dict[str, Any]:
    """Needles and loss under each layout, as edits, on compress's problems."""
    task = interp.tasks.get("niah").exactly(context)
    found = {}
    for name, edit in layouts(context).items():
        needles = interp.evaluate(model, task, [edit], n=n, seed=seed + 1, format="auto")
        rows = rows_for_loss(model, None, None, context, max(2, n // 2), seed)
        loss = continuation_loss(model, rows, [edit], steps=False, progress=False)
        found[name] = {
            key: dict(mean=value.mean, low=value.low, high=value.high)
            for key, value in (
                ("needles", needles.edited),
                ("needles_change", needles.difference),
                ("loss", loss.edited),
                ("loss_change", loss.difference),
            )
        }
    return found


def _cell(row: dict[str, Any], name: str, digits: int = 2) -> str:
    if row.get(name) is None:
        return ""
    ends = dict(mean=row[name], low=row[f"{name}_low"], high=row[f"{name}_high"])
    if name.endswith("change"):
        return published.change(ends, digits)
    return published.interval(ends, lambda x: f"{x:.{digits}f}")


def markdown(result: dict[str, Any]) -> str:
    """The tables, a context after the other."""
    lines = []
    for context, part in sorted(result["contexts"].items(), key=lambda item: int(item[0])):
        head = "| cache | memory | needles | change | loss, nats a token | change |"
        lines += [f"### {int(context):,} tokens", "", head, "|---" * 6 + "|"]
        whole = None
        for _, found in sorted(part["budgets"].items(), reverse=True):
            for row in found["rows"]:
                if row["cache"] == "whole":
                    if whole is None:
                        whole = row
                    else:
                        continue
                name = row["cache"].replace("3 random draws", "random kv heads, 3 draws")
                if name.startswith("by "):
                    name = f"chosen {name}: {found['kept'].split(' kv heads')[0]} whole"
                cells = [
                    f"{row['memory']:.2f}",
                    _cell(row, "needles"),
                    _cell(row, "needles_change"),
                ]
                cells += [_cell(row, "loss"), _cell(row, "loss_change", 3)]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        for name, row in part.get("layouts", {}).items():
            flat = {
                key + end: value[of]
                for key, value in row.items()
                for of, end in (("mean", ""), ("low", "_low"), ("high", "_high"))
            }
            cells = ["1.00", _cell(flat, "needles"), _cell(flat, "needles_change")]
            cells += [_cell(flat, "loss"), _cell(flat, "loss_change", 3)]
            lines.append(f"| edit, {name} | {' | '.join(cells)} |")
        n = part["n"]
        lines += ["", f"{n} needles, {max(2, n // 2)} texts; {published.where([part])}.", ""]
    lines += [
        f"{MODEL}, {DTYPE}; streaming kv heads hold {SINK} first and {RECENT} recent tokens; "
        f"brackets are 95 % intervals, changes are paired, bold where the interval leaves 0 out.",
    ]
    return "\n".join(lines)


def measure(options: Any, result: dict[str, Any]) -> None:
    """Add a context's budgets and layouts to the result."""
    model = interp.load(MODEL, dtype=DTYPE)
    part = result["contexts"].setdefault(str(options.context), dict(budgets={}, n=options.n))
    if part["n"] != options.n:
        raise SystemExit(f"{options.context} tokens were measured with n = {part['n']}.")
    began = time.time()
    atlas = None
    for budget in options.budgets:
        if str(budget) in part["budgets"]:
            continue
        if atlas is None:
            atlas = interp.scan_heads(
                model, "retrieval", context=min(options.context, 1024), samples=SAMPLES, seed=0
            )
        part["budgets"][str(budget)] = compressed(
            model, atlas, budget, options.context, options.n, options.seed
        )
        print(f"{time.time() - began:.0f} s: budget {budget}", flush=True)
        part.update(published.stamp())
        published.publish(result, markdown(result), options, BEGIN, END)
    if "layouts" not in part:
        part["layouts"] = edited(model, options.context, options.n, options.seed)
        part.update(published.stamp())


def main(given: Sequence[str] | None = None) -> None:
    parser = published.parser(__doc__, "cache_table", n=24, threads=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    settings = dict(model=MODEL, dtype=DTYPE, seed=options.seed)
    result = published.earlier(options, **settings) or dict(**settings, contexts={})
    if not options.table:
        measure(options, result)
    published.publish(result, markdown(result), options, BEGIN, END)


if __name__ == "__main__":
    main()
