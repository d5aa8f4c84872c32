"""Circuit methods against the truth: pocket-llama's circuits by exhaustive ablation, and planted
ones that are exact.

    python examples/circuit_table.py --page docs/results.md

Writes the JSON, and the truths measured in pocket-llama (`interp/circuits/truths`), and prints the
table as markdown; with --page it goes between the markers of that page. No prompt of a truth is
seen by a method. Settings are the methods' defaults and published presets; nothing was tuned here.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published import cpu, put

import interp
from interp.circuits import (
    Circuit,
    Truth,
    evaluate,
    faithfulness,
    find,
    measured,
    planted,
    published,
    resampled,
)
from interp.circuits.known.truth import BUNDLED
from interp.circuits.measured import APART
from interp.circuits.runs.prompts import Prompts, from_task
from interp.tasks.task import Task
from interp_hooks import HookedModel, hook

BEGIN, END = "<!-- circuit table: begin -->", "<!-- circuit table: end -->"
POCKET = ("ioi", "greater_than", "docstring", "colored_objects")
TRUTH_PROMPTS = 2048
#: label → (method, settings, pairs of prompts where not the usual number, seeds where not the usual
#: number)
METHODS: dict[str, tuple[str, dict[str, Any], int | None, int | None]] = {
    "discrete SAE": ("discrete_sae", {}, None, None),
    "discrete SAE, paper, node": ("discrete_sae", {"preset": "paper"}, 250, None),
    "discrete SAE, paper, edge": ("discrete_sae", {"preset": "paper-edge"}, 250, None),
    "attribution, mean": ("attribution", {"mode": "mean"}, None, None),
    "attribution, resample": ("attribution", {}, None, None),
    "EAP": ("eap", {}, None, None),
    "EAP-IG, inputs": ("eap_ig", {}, None, None),
    "EAP-IG, activations": ("eap_ig", {"mode": "activations"}, None, 1),
    "HISP": ("hisp", {}, None, None),
    "ACDC": ("acdc", {}, 32, 1),
    "path patching to the output": ("path_patching", {}, None, None),
    "head ablation, resample (all heads)": ("head_ablation", {"mode": "resample"}, None, None),
    "head ablation, mean (all heads)": ("head_ablation", {}, None, None),
}


@dataclass(frozen=True)
class Case:
    """A model, a task, and the heads that do it."""

    label: str
    model: HookedModel
    task: str | Task
    truth: Truth

    def prompts(self, n: int, seed: int) -> Prompts:
        """`n` pairs that the truth was not measured on."""
        seen: set[tuple[int, ...]] = set()
        if isinstance(self.task, str):
            seen = {i.ids for i in from_task(self.model, self.task, TRUTH_PROMPTS, APART).instances}
        drawn = from_task(self.model, self.task, 2 * n, seed)
        return Prompts(drawn.task, tuple(i for i in drawn.instances if i.ids not in seen)[:n])


def cases(fresh: bool) -> list[Case]:
    """pocket-llama on its tasks and the planted circuits; `fresh`: measure pocket-llama's truths
    anew and save them."""
    model = interp.load("llama")
    found = []
    for task in POCKET:
        if fresh:
            measured(model, task, TRUTH_PROMPTS).save(BUNDLED / model.name / f"{task}.json")
        found.append(Case(task, model, task, published(task, model.name)))
    for name in planted.names():
        made = planted.get(name)
        found.append(Case(f"planted {name}", made.model, made.task, made.truth))
    return found


def measure(
    n: int, seeds: int, stable: int, given: list[Case], only: list[str] | None = None
) -> dict[str, Any]:
    """Every method on every case."""
    rows: dict[str, Any] = {}
    find(
        given[0].model, given[0].task, "discrete_sae", 4, trials=1, steps=1
    )  # sae_lens takes seconds to import, once
    for label, (method, settings, pairs, repeats) in METHODS.items():
        if only is not None and label not in only:
            continue
        rows[label] = {}
        for case in given:
            runs = [
                (
                    seed,
                    find(case.model, case.prompts(pairs or n, seed), method, seed=seed, **settings),
                )
                for seed in range(repeats or seeds)
            ]
            rows[label][case.label] = _cell(case, n, runs)
            print(f"{label}: {case.label} {rows[label][case.label]['auc']:.3f}", flush=True)
    return dict(
        n=n,
        seeds=seeds,
        truth_prompts=TRUTH_PROMPTS,
        methods=rows,
        stability=_stability(given[0], n, stable),
        truths={
            case.label: dict(
                heads=len(case.truth.heads), of=case.truth.matrix().size, source=case.truth.source
            )
            for case in given
        },
        date=time.strftime("%Y-%m-%d"),
        machine=f"{cpu()}, threads: {torch.get_num_threads()}",
        versions={p: version(p) for p in ("torch", "transformers", "sae-lens", "interp")},
    )


def _cell(case: Case, n: int, runs: list[tuple[int, Circuit]]) -> dict[str, Any]:
    """One method on one case: agreement with the truth, curves on prompts of their own, and what it
    took."""
    agreements = [evaluate(circuit, case.truth) for _, circuit in runs]
    curve = faithfulness(case.model, runs[0][1], case.task, n=n, orders=1)
    searches = [circuit.search for _, circuit in runs]
    means = {
        name: float(np.mean([getattr(a, name) for a in agreements]))
        for name in ("auc", "auc_pessimistic", "average_precision")
    }
    return dict(
        **means,
        auc_sd=float(np.std([a.auc for a in agreements])),
        precision_at_k=float(np.mean([a.precision[a.n_positive] for a in agreements])),
        cpr=curve.cpr, cmd=curve.cmd, random_cpr=curve.random_cpr,
        n=searches[0].n, forwards=searches[0].forwards, backwards=searches[0].backwards,
        seconds=float(np.mean([s.seconds for s in searches])),
    )  # fmt: skip


def _stability(case: Case, n: int, resamples: int) -> dict[str, Any]:
    """Mean Jaccard overlap of the top heads (as many as the truth has) over bootstrap resamples of
    the prompts."""
    if resamples < 2:
        return {}
    k, found = len(case.truth.heads), {}
    quick = {
        **METHODS,
        "discrete SAE, 3 trials": ("discrete_sae", {"trials": 3, "steps": 100}, None, None),
    }
    for label in ("discrete SAE, 3 trials", "attribution, mean", "attribution, resample", "EAP"):
        method, settings, _, _ = quick[label]
        found[label] = asdict(
            resampled(case.model, case.prompts(n, 0), method, k, resamples, **settings)
        )
        print(f"stability of {label}: {found[label]['mean']:.3f}", flush=True)
    return dict(case=case.label, k=k, methods=found)


def speed(n: int) -> dict[str, Any]:
    """Seconds on a model of GPT-2 small's shape (12 × 12 heads, width 768), random weights."""
    import transformers

    folder = interp.models.get("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model = hook(module, name="random GPT-2 small", tokenizer=tokenizer)
    found: dict[str, Any] = {}
    for label in ("discrete SAE", "head ablation, mean (all heads)"):
        method, settings, _, _ = METHODS[label]
        search = find(model, "ioi", method, n, force=True, **settings).search
        found[label] = dict(
            seconds=search.seconds, forwards=search.forwards, backwards=search.backwards
        )
        print(f"{label}: {search.seconds:.1f} s", flush=True)
    whole = found["head ablation, mean (all heads)"]["seconds"]
    for entry in found.values():
        entry["share"] = entry["seconds"] / whole
    return dict(
        n=n,
        methods=found,
        date=time.strftime("%Y-%m-%d"),
        machine=f"{cpu()}, threads: {torch.get_num_threads()}",
    )


def render(result: dict[str, Any]) -> str:
    """Markdown: a method a row; ROC AUC case by case, then means over the cases."""
    shown = [c for c in result["truths"] if c != "colored_objects"]
    heads = ["mean AUC", *shown, "mean AP", "mean CMD", "passes", "seconds"]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for label, cells in result["methods"].items():
        these = [cells[c] for c in shown]
        mean = {
            k: float(np.mean([c[k] for c in these]))
            for k in ("auc", "average_precision", "cmd", "seconds")
        }
        passes = f"{these[0]['forwards']:.0f}" + (
            f" + {these[0]['backwards']:.0f}" if these[0]["backwards"] else ""
        )
        row = [
            f"{mean['auc']:.2f}",
            *(f"{c['auc']:.2f}" for c in these),
            f"{mean['average_precision']:.2f}",
            f"{mean['cmd']:.2f}",
            passes,
            f"{mean['seconds']:.1f}",
        ]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    about = (
        f"{result['n']} pairs of prompts (paper presets 250, ACDC 32), means of {result['seeds']} "
        "seeds (ACDC, EAP-IG "
        f"activations: 1); passes (forwards + backwards) on the first case; {result['machine']}, "
        f"{result['date']}, "
        "float32 ([all numbers](../examples/circuit_table.json), with coloured objects, stability "
        "and timing)."
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=64, help="pairs of prompts")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--stability", type=int, default=100, help="bootstrap resamples; 0 leaves stability out"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--keep-truths", action="store_true", help="don't measure pocket-llama's circuits anew"
    )
    parser.add_argument("--out", default="examples/circuit_table.json")
    parser.add_argument("--page", help="a page to put the table into: docs/results.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(
        arguments.n, arguments.seeds, arguments.stability, cases(not arguments.keep_truths)
    )
    result["speed"] = speed(arguments.n)
    Path(arguments.out).write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(render(result))
    if arguments.page:
        page = Path(arguments.page)
        page.write_text(
            put(page.read_text(encoding="utf-8"), render(result), BEGIN, END), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
