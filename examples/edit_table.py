"""What each edit does to pocket-llama: classification, needles at and past the trained length, loss
of continuations.

    python examples/edit_table.py --n 64 --out examples/edit_table.json

Writes the JSON, prints the table as markdown, and with --page docs/results.md puts it between that
page's markers. Every edit is set up as a user without knowledge of the model would: published
defaults or round numbers, all heads (the ablation takes the three strongest retrieval heads).
Nothing was tuned on these problems, and nothing was left out because it does not help. The loss is
of the second half of rows of 512 tokens (facts in prose, asked again), fed token by token.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from published import change, interval, parser, publish, stamp

import interp
from interp.errors import UnknownNameError
from interp.evaluation.accuracy import by_steps, judge, sample
from interp.support.statistics import bootstrap, mcnemar
from interp.tasks.classification import Classification
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.task import Task

TRAINED = 1024
RETRIEVAL = ["L1H5", "L1H6", "L1H7"]
BEGIN, END = "<!-- edit table: begin -->", "<!-- edit table: end -->"

LOSS = "loss, nats a token"

#: what the table calls it, the edit's registered name, its settings
EDITS: list[tuple[str, str, dict[str, Any]]] = [
    ("ZeroTuning γ = 2", "zero_tuning", dict(gamma=2.0)),
    ("ZeroTuning γ = 0.5", "zero_tuning", dict(gamma=0.5)),
    ("ScaleTokens, first token × 0", "scale_tokens", dict(keys="initial", gain=0.0)),
    (
        "MoveMass, first token → next 63, half",
        "move_mass",
        dict(donors="initial", receivers=(1, 64), share=0.5),
    ),
    ("ACT, paper (α = 5, β = 0.4)", "act", dict()),
    ("ACT, code (threshold 0.1)", "act", dict(threshold=0.1)),
    ("Temperature τ = 0.8", "temperature", dict(tau=0.8)),
    ("Temperature τ = 1.25", "temperature", dict(tau=1.25)),
    ("SoftPAG u = 0.1", "soft_pag", dict(u=0.1)),
    ("Streaming, 4 + 512", "streaming", dict(sink=4, recent=512)),
    ("Gate α = 0.5, 64 + 256", "gate", dict(alpha=0.5, sink=64, recent=256)),
    ("HeadGate, 50 % + 25 %", "head_gate", dict()),
    (
        "ScaleHeads, 3 retrieval heads × 1.5",
        "scale_heads",
        dict(gains=dict.fromkeys(RETRIEVAL, 1.5)),
    ),
    ("Ablate, 3 retrieval heads", "ablate", dict(heads=RETRIEVAL)),
]


def tasks_of(n: int) -> dict[str, tuple[Task, int]]:
    """column → (task, how many problems)."""
    columns: dict[str, tuple[Task, int]] = {
        "classification, 4 shots": (Classification(), n),
        "classification, 0 shots": (Classification(shots=0), n),
    }
    for factor in (1, 1.5, 2, 4):
        count = max(5, n // (8 if factor > 2 else 4))
        columns[f"needle, {factor:g} ×"] = (
            NeedleInAHaystack(lengths=(int(factor * TRAINED),)),
            count,
        )
    return columns


def measure(n: int, seed: int, columns: list[str] | None = None) -> dict[str, Any]:
    """Every column for every edit; columns: only these."""
    model = interp.load("llama")
    made = []
    for label, name, settings in EDITS:
        try:
            made.append((label, interp.edits.registry.get(name)(**settings)))
        except UnknownNameError:
            print(f"{label}: this version has no edit {name}", flush=True)
    rows: dict[str, dict[str, Any]] = {
        label: dict(edit=edit.to_json(), cells={}) for label, edit in made
    }
    baseline: dict[str, Any] = {}
    for column, (task, count) in tasks_of(n).items():
        if columns is not None and column not in columns:
            continue
        _, instances = sample(model, task, count, seed, extrapolate=True)
        plain = [correct for correct, _ in judge(model, task, instances)]
        baseline[column] = vars(bootstrap(plain, seed))
        for label, edit in made:
            start = time.time()
            found = [
                correct for correct, _ in judge(model, task, instances, [edit], by_steps([edit]))
            ]
            change, test = (
                bootstrap([b - a for a, b in zip(plain, found, strict=True)], seed),
                mcnemar(plain, found),
            )
            cell = dict(
                edited=vars(bootstrap(found, seed)),
                change=vars(change),
                p=None if test is None else test.p,
            )
            rows[label]["cells"][column] = cell
            print(f"{column}: {label}: {change} ({time.time() - start:.0f} s)", flush=True)
    column = LOSS
    for label, edit in made if columns is None or column in columns else []:
        result = interp.evaluate(
            model, "niah", [edit], metric="loss", n=max(5, n // 8), context=512, seed=seed
        )
        assert result.edited is not None and result.difference is not None
        baseline[column] = vars(result.baseline)
        rows[label]["cells"][column] = dict(
            edited=vars(result.edited), change=vars(result.difference), p=None
        )
        print(f"{column}: {label}: {result.difference}", flush=True)
    return dict(
        model=model.name, trained_length=TRAINED, n=n, seed=seed, baseline=baseline, edits=rows,
        **stamp(),
    )  # fmt: skip


def render(result: dict[str, Any]) -> str:
    """The result as markdown: baseline, then changes with 95 % intervals; bold where the interval
    leaves 0 out."""
    columns = list(result["baseline"])
    counts = [f"{c} (n = {result['baseline'][c]['n']})" for c in columns]
    lines = ["| | " + " | ".join(counts) + " |", "|---|" + "---|" * len(columns)]
    baseline = [interval(result["baseline"][c], "{:.2f}".format) for c in columns]
    lines.append("| **untouched** | " + " | ".join(baseline) + " |")
    for label, row in result["edits"].items():
        cells = [change(row["cells"][c]["change"], 3 if c == LOSS else 2) for c in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    about = f"Measured on {result['machine']}, {result['date']}, seed {result['seed']}, float32"
    return "\n".join([*lines, "", f"{about} ([all numbers](../examples/edit_table.json))."])


def main() -> None:
    # classification problems; needles are a quarter or an eighth of them
    options = parser(__doc__, "edit_table", 64, threads=1)
    options.add_argument("--columns", help="only these, separated by semicolons", default=None)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(
        arguments.n, arguments.seed, arguments.columns and arguments.columns.split(";")
    )
    publish(result, render(result), arguments, BEGIN, END)


if __name__ == "__main__":
    main()
