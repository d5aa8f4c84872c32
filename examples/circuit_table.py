"""Circuit methods, each beside its control, against truths that are measured and truths that are
known.

    python examples/circuit_table.py --state STATE --page docs/results.md

pocket-llama's tasks, where heads count by exhaustive ablation in three ways (mean, resampling, the
best constant), and constructed models, whose circuits are known head by head and edge by edge.
Every method runs beside itself on shuffled prompts and beside rankings that know nothing of the
task. No prompt of a truth is seen by a method; settings are defaults and published presets; nothing
was tuned here. What is finished is kept in STATE, so that a run that was interrupted goes on; rows
that --out holds already (a case, a method, a truth) stay, and are measured anew only where
--methods names them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from published import earlier, parser, publish, stamp, where

import interp
from interp.circuits import Bench, Truth, bench, constructed, controls, faithfulness, find, measured
from interp.circuits.known.truth import BUNDLED
from interp.errors import TapError
from interp.tasks.task import Task
from interp_hooks import HookedModel

BEGIN, END = "<!-- circuit table: begin -->", "<!-- circuit table: end -->"
POCKET = ("ioi", "greater_than", "docstring", "induction", "colored_objects")
MODES = ("mean", "resample", "optimal")
TRUTH_PROMPTS = 1024
#: prompts of a truth by the best constant, which takes eighty times as long
OPTIMAL_PROMPTS = 128


@dataclass(frozen=True)
class Row:
    """A method with its settings; `n` pairs of prompts and `draws` of each control where they are
    not the usual numbers."""

    method: str
    settings: dict[str, Any]
    n: int | None = None
    draws: int | None = None


METHODS: dict[str, Row] = {
    "discrete SAE, node": Row("discrete_sae", {}, 250, 1),
    "discrete SAE, edge": Row("discrete_sae", {"score": "edge"}, 250, 1),
    "attribution by code": Row("attribution_by_code", {}),
    "attribution, mean": Row("attribution", {"mode": "mean"}),
    "attribution, resample": Row("attribution", {}),
    "AtP*": Row("atp_star", {}),
    "RelP": Row("relp", {}),
    "GIM": Row("gim", {}),
    "HISP": Row("hisp", {}),
    "EAP": Row("eap", {}),
    "EAP-IG, inputs": Row("eap_ig", {}),
    "EAP-IG, activations": Row("eap_ig", {"mode": "activations"}, None, 1),
    "edge pruning": Row("edge_pruning", {}, None, 1),
    "head gating": Row("head_gating", {}, None, 1),
    "ACDC": Row("acdc", {}, 16, 1),
    "path patching to the output": Row("path_patching", {}),
    "head ablation, resample (all heads)": Row("head_ablation", {"mode": "resample"}),
    "head ablation, mean (all heads)": Row("head_ablation", {}),
}


@dataclass(frozen=True)
class Case:
    """A model, a task, and the truths about its heads."""

    label: str
    model: HookedModel
    task: str | Task
    truths: tuple[Truth, ...]


def truth_of(model: HookedModel, task: str, mode: str, state: Path) -> Truth:
    """pocket-llama's heads by one ablation: the bundled truth by mean, else measured and kept."""
    path = BUNDLED / model.name / f"{task}.json"
    if mode != "mean" or not path.is_file():
        path = state / "truths" / f"{task}-{mode}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        n = OPTIMAL_PROMPTS if mode == "optimal" else TRUTH_PROMPTS
        measured(model, task, n, mode=mode).save(path)
        print(f"{task}: truth by {mode}", flush=True)
    return replace(Truth.load(path), name=mode)


def cases(state: Path, only: list[str] | None = None, modes: Sequence[str] = MODES) -> list[Case]:
    """pocket-llama on its tasks, and the constructed models."""
    model = interp.load("llama", device="cpu")
    found = [
        Case(task, model, task, tuple(truth_of(model, task, mode, state) for mode in modes))
        for task in POCKET
        if only is None or task in only
    ]
    for name in constructed.names():
        label = f"planted {name}" if name in POCKET else name
        if only is None or label in only:
            made = constructed.get(name)
            found.append(Case(label, made.model, made.task, (replace(made.truth, name="known"),)))
    return found


def folder_of(case: Case, label: str, state: Path) -> Path:
    """Where a method's rows on a case, beside its truths, are kept."""
    truths = " ".join(truth.name for truth in case.truths)
    return state / re.sub(r"[^a-z0-9]+", "-", f"{case.label} {label} {truths}".lower())


def measure(case: Case, label: str, row: Row, n: int, draws: int, state: Path) -> pd.DataFrame:
    """One method on one case: the bench's rows, with the curves of the circuit."""
    folder = folder_of(case, label, state)
    if not (folder / "bench.json").is_file():
        method = interp.circuits.registry.get(row.method).make(**row.settings)
        made = bench(
            case.model, case.task, {label: method}, list(case.truths), row.n or n,
            draws=row.draws or draws, controls=[], truth_prompts=TRUTH_PROMPTS,
        )  # fmt: skip
        frame = made.frame.assign(**curves(case, method, n), n=row.n or n)
        replace(made, frame=frame).save(folder)
        print(f"{case.label}: {label} {frame['auc'].tolist()}", flush=True)
    return Bench.load(folder).frame.assign(case=case.label)


def curves(case: Case, method: Any, n: int) -> dict[str, float]:
    """CPR and CMD of heads and, where there are some, of edges."""
    circuit = find(case.model, case.task, method, min(n, 32))
    found: dict[str, float] = {}
    for of in ("heads", "edges"):
        if of == "edges" and (not len(circuit.edges) or method.edges_of != "graph"):
            continue
        try:
            curve = faithfulness(case.model, circuit, case.task, n=24, of=of, orders=1)
        except TapError as reason:
            print(f"{case.label}: {method.name}, {of}: {reason}", flush=True)
            continue
        assert curve.random_cpr is not None
        found |= {f"cpr_{of}": curve.cpr, f"cmd_{of}": curve.cmd, f"random_{of}": curve.random_cpr}
    return found


def naive(case: Case, n: int, state: Path) -> pd.DataFrame:
    """The rankings that know nothing of the task."""
    folder = folder_of(case, "controls", state)
    if not (folder / "bench.json").is_file():
        bench(case.model, case.task, {}, list(case.truths), n, truth_prompts=TRUTH_PROMPTS).save(
            folder
        )
    return Bench.load(folder).frame.assign(case=case.label, n=n)


def cell(rows: pd.DataFrame) -> str:
    """AUC with its interval, † where a shuffled twin is as good."""
    if not len(rows):
        return "–"
    first = rows.iloc[0]
    lost = bool(((rows["control"] != "") & ~rows["beats"].astype(bool)).any())
    mark = "†" if lost else ""
    return f"{first['auc']:.2f}{mark} [{first['auc_low']:.2f}, {first['auc_high']:.2f}]"


def table(frame: pd.DataFrame, truth: str, ranked: str, shown: list[str]) -> list[str]:
    """Markdown: a method a row, a case a column, then what it takes."""
    mine = frame[(frame["truth"] == truth) & (frame["ranked"] == ranked)]
    lines = [
        "| | " + " | ".join(shown) + " | passes | s |",
        "|---|" + "---|" * (len(shown) + 2),
    ]
    for label, some in mine.groupby("method", sort=False):
        first = some.iloc[0]
        cells = [cell(some[some["case"] == name]) for name in shown]
        passes = f"{first['forwards']:.0f} + {first['backwards']:.0f}"
        lines.append(
            f"| {label} | " + " | ".join(cells) + f" | {passes} | {first['seconds']:.1f} |"
        )
    return lines


def areas(frame: pd.DataFrame) -> list[str]:
    """Markdown: mean CPR and CMD over pocket-llama's tasks, of heads and of edges."""
    mine = frame[frame["case"].isin(POCKET) & frame["cpr_heads"].notna()]
    lines = [
        "| | CPR, heads | random | CMD, heads | CPR, edges | random | CMD, edges |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, some in mine.groupby("method", sort=False):
        by_case = some.groupby("case").first()
        cells = []
        for name in (f"{a}_{of}" for of in ("heads", "edges") for a in ("cpr", "random", "cmd")):
            there = by_case[name].notna().all() if name in by_case else False
            cells.append(f"{by_case[name].mean():.2f}" if there else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def render(result: dict[str, Any]) -> str:
    """Markdown: a table a truth, then edges, then areas."""
    frame = pd.DataFrame(result["rows"])
    frame["control"] = frame["control"].fillna("")
    tasks = [c for c in result["cases"] if c in POCKET]
    built = [c for c in result["cases"] if c not in POCKET]
    parts: list[str] = []
    truths = [result["truths"][task] for task in tasks]
    for mode in (m for m in (truths[0] if tasks else ()) if all(m in one for one in truths)):
        sizes = ", ".join(f"{t} {result['truths'][t][mode]}" for t in tasks)
        parts += [f"**pocket-llama, heads that matter by {mode}** ({sizes} of 32)", ""]
        parts += [*table(frame, mode, "heads", tasks), ""]
    for ranked in ("heads", "edges") if built else ():
        parts += [
            f"**constructed models, {ranked}**",
            "",
            *table(frame, "known", ranked, built),
            "",
        ]
    if tasks:
        parts += [
            "**areas under the curves, means over pocket-llama's tasks**",
            "",
            *areas(frame),
            "",
        ]
    about = (
        "ROC AUC [95 %, Hanley–McNeil]; † a shuffled twin is as good (labels, pairs, sides or "
        "codes shuffled; the 95 % interval of the paired difference holds 0). "
        f"{result['n']} pairs of prompts (discrete SAE 250, ACDC 16), {result['draws']} shuffles "
        f"of each kind; {where(result['rows'])}, float32 "
        "([all numbers](../examples/circuit_table.json))."
    )
    return "\n".join([*parts, about])


def main() -> None:
    made = parser(__doc__, "circuit_table", 64)
    made.add_argument("--state", required=True, help="folder for what is finished")
    made.add_argument("--draws", type=int, default=3)
    made.add_argument("--cases", nargs="*", help="some of the cases")
    made.add_argument("--truths", nargs="*", default=MODES, choices=MODES)
    made.add_argument("--methods", nargs="*", help="some of the methods, by label")
    made.add_argument("--kept", action="store_true", help="only what STATE holds already")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    state = Path(options.state)
    before = earlier(options, n=options.n, draws=options.draws)
    given = cases(state, options.cases, options.truths)
    have = {key_of(row) for row in before.get("rows", [])}

    def lacking(case: Case, methods: Sequence[str]) -> Case:
        """The case with those of its truths that some of the methods were not held to."""
        truths = [
            t for t in case.truths if any((case.label, m, t.name) not in have for m in methods)
        ]
        return replace(case, truths=tuple(truths))

    frames = [pd.DataFrame()]
    for case in given:
        if (some := lacking(case, controls.names())).truths:
            frames.append(naive(some, options.n, state))
        for label, row in METHODS.items():
            if options.methods is not None and label not in options.methods:
                continue
            some = case if options.methods else lacking(case, [label])
            there = (folder_of(some, label, state) / "bench.json").is_file()
            if some.truths and (there or not options.kept):
                frames.append(measure(some, label, row, options.n, options.draws, state))
    measured_here = {k: v for k, v in stamp().items() if k in ("machine", "date")}
    frame = pd.concat(frames, ignore_index=True).assign(**measured_here)
    publish_with(before, given, frame, options)


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """What a row is of: case, method, truth."""
    return row["case"], row["method"], row["truth"]


def publish_with(
    before: dict[str, Any], given: Sequence[Case], frame: pd.DataFrame, options: Any
) -> None:
    """Writes what was measured, beside the rows of before that it does not have."""
    rows = frame.replace({np.nan: None}).to_dict("records")
    new = {key_of(row) for row in rows}
    rows += [row for row in before.get("rows", []) if key_of(row) not in new]
    methods = [*METHODS, *controls.names()]
    truths = before.get("truths", {})
    for case in given:
        truths.setdefault(case.label, {}).update({t.name: len(t.heads) for t in case.truths})
    order = [*POCKET, *(name for name in truths if name not in POCKET)]
    shown = [name for name in order if name in truths]
    rows.sort(key=lambda r: (shown.index(r["case"]), methods.index(r["method"])))
    result = dict(
        rows=rows, cases=shown, truths={name: truths[name] for name in shown},
        controls=controls.names(), n=options.n, draws=options.draws,
    )  # fmt: skip
    publish(result, render(result), options, BEGIN, END)


if __name__ == "__main__":
    main()
