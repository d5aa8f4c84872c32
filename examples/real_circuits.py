"""Circuits of a model that nobody here trained: SmolLM2-135M-Instruct, head by head.

    python examples/real_circuits.py --icl FOLDER --state STATE --page docs/results.md

Of each task: which heads matter, by exhaustive ablation in two ways; five gradient methods (one
with two ablations), each beside the same method on shuffled prompts; how faithful the best ranking
is; and which heads two tasks share, beside chance. FOLDER holds relations as JSON lists of
{"input", "output"} (those of Todd et al. 2024). Every piece is kept in STATE, so that a run that
was interrupted goes on; tasks that --out holds already stay beside those of --tasks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published import earlier, parser, publish, stamp, where

import interp
from interp import circuits
from interp.circuits.judging.reuse import chance
from interp.circuits.measured import measured
from interp.tasks.relations import Relation

BEGIN, END = "<!-- real circuits: begin -->", "<!-- real circuits: end -->"
MODEL = "smollm2-135m"
TASKS = ("ioi", "greater_than", "docstring", "induction", "colored_objects")
RELATIONS = ("country-capital", "present-past", "antonym")
TRUTHS = ("mean", "resample")
METHODS: dict[str, Any] = {
    "attribution, mean": ("attribution", {"mode": "mean"}),
    "attribution, resample": ("attribution", {}),
    "EAP": ("eap", {}),
    "EAP-IG": ("eap_ig", {}),
    "RelP": ("relp", {}),
    "AtP*": ("atp_star", {}),
}
#: shots of a relation's prompts
SHOTS = 5


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a JSON file holds, made where there is none."""
    if not path.is_file():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made, indent=1, ensure_ascii=False), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def task_of(name: str, icl: Path) -> Any:
    if name in TASKS:
        return name
    return Relation(str(icl / f"{name}.json"), shots=SHOTS)


def truth(model: Any, task: Any, mode: str, n: int, folder: Path) -> tuple[Any, float]:
    """The heads that matter by one ablation, and the seconds it took."""
    path = folder / f"truth-{mode}.json"
    if not path.is_file():
        started = time.perf_counter()
        found = measured(model, task, n, mode=mode, progress=True, resume=folder / mode)
        found.save(path)
        (folder / f"truth-{mode}.seconds").write_text(f"{time.perf_counter() - started:.1f}")
    return circuits.Truth.load(path), float((folder / f"truth-{mode}.seconds").read_text())


def one(model: Any, name: str, options: Any) -> dict[str, Any]:
    """All of one task."""
    folder = Path(options.state) / name
    folder.mkdir(parents=True, exist_ok=True)
    task = task_of(name, Path(options.icl))
    truths, seconds = {}, {}
    for mode in TRUTHS:
        truths[mode], seconds[mode] = truth(model, task, mode, options.truth_prompts, folder)
        truths[mode] = renamed(truths[mode], mode)
        print(name, mode, truths[mode], flush=True)
    if not (folder / "bench").is_dir():
        methods = {
            label: circuits.registry.get(method).make(**settings)
            for label, (method, settings) in METHODS.items()
        }
        circuits.bench(
            model, task, methods, list(truths.values()), options.n, draws=options.draws,
            truth_prompts=options.truth_prompts,
            progress=lambda done, total, what: print(name, what, f"{done} of {total}", flush=True),
            resume=folder,
        ).save(folder / "bench")  # fmt: skip
    found = circuits.Bench.load(folder / "bench")

    def curve() -> dict[str, Any]:
        """Of the ranking by the truth itself, and by the method that any user starts with."""
        made = {}
        for label in ("EAP", "truth by resample"):
            ranking: Any = circuits.find(model, task, "eap", options.n)
            if label != "EAP":
                ranking = effects_of(truths["resample"])
            c = circuits.faithfulness(model, ranking, task, options.n, seed=7, orders=2)
            made[label] = dict(
                cpr=c.cpr, cmd=c.cmd, random_cpr=c.random_cpr, frame=c.frame.to_dict("list"),
            )  # fmt: skip
        return made

    return dict(
        truths={
            mode: dict(
                heads={str(h): kind for h, kind in t.heads.items()},
                effects={str(h): v for h, v in t.effects.items()},
                source=t.source,
                seconds=seconds[mode],
            )
            for mode, t in truths.items()
        },
        rows=found.frame.replace({np.nan: None}).to_dict("records"),
        curves=kept(folder / "curves.json", curve),
    )


def renamed(truth: Any, mode: str) -> Any:
    from dataclasses import replace

    return replace(truth, name=mode)


def effects_of(truth: Any) -> dict[Any, float]:
    return {head: abs(value) for head, value in truth.effects.items()}


def shared(result: dict[str, Any], layers: int, heads: int) -> list[dict[str, Any]]:
    """Of each two tasks: heads that both truths by resampling have, beside chance."""
    sizes = dict.fromkeys(range(layers), heads)
    rows = []
    for a, b in combinations(result, 2):
        sets = [
            {interp.Head(h) for h in result[name]["truths"]["resample"]["heads"]} for name in (a, b)
        ]
        expected, p = chance(sets[0], sets[1], sizes)
        both = sets[0] & sets[1]
        rows.append(
            dict(
                a=a,
                b=b,
                n_a=len(sets[0]),
                n_b=len(sets[1]),
                shared=len(both),
                expected=expected * len(sets[1]),
                p=p,
                heads=sorted(map(str, both)),
            )
        )
    return rows


def signed(number: float) -> str:
    """ "−0.23"."""
    return f"{number:.2f}".replace("-", "−")


def render(result: dict[str, Any]) -> str:
    """Markdown: what matters, what finds it, what is shared."""
    heads = ["task", "heads by mean", "by resampling", "in both", "strongest by resampling"]
    parts = ["| " + " | ".join(heads) + " |", "|---|---|---|---|---|"]
    for name, found in result["tasks"].items():
        mean, resample = (found["truths"][m]["heads"] for m in TRUTHS)
        effects = found["truths"]["resample"]["effects"]
        both = len(set(mean) & set(resample))
        top = sorted(resample, key=lambda h: -abs(effects[h]))[:5]
        said = ", ".join(f"{h} {effects[h]:+.2f}".replace("-", "−") for h in top)
        parts.append(f"| {name} | {len(mean)} | {len(resample)} | {both} | {said} |")
    for mode in TRUTHS:
        parts += ["", f"AUC against the truth by {mode}; † does not beat its shuffled twin.", ""]
        names = list(result["tasks"])
        parts += ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for label in dict.fromkeys(r["method"] for r in result["tasks"][names[0]]["rows"]):
            cells = []
            for name in names:
                rows = [
                    r
                    for r in result["tasks"][name]["rows"]
                    if (r["method"], r["truth"]) == (label, mode)
                ]
                one = rows[0]
                lost = [r["control"] for r in rows if r["control"] and not r["beats"]]
                mark = "†" if lost else ""
                cells.append(
                    f"{one['auc']:.2f}{mark} [{one['auc_low']:.2f}, {one['auc_high']:.2f}]"
                )
            parts.append(f"| {label} | " + " | ".join(cells) + " |")
    parts += ["", "| heads kept by | task | CPR | random orders | CMD |", "|---|---|---|---|---|"]
    for name, found in result["tasks"].items():
        for ranking, curve in found["curves"].items():
            numbers = (curve[k] for k in ("cpr", "random_cpr", "cmd"))
            parts.append(f"| {ranking} | {name} | {' | '.join(signed(x) for x in numbers)} |")
    parts += ["", "| tasks | heads | shared | by chance | p |", "|---|---|---|---|---|"]
    for row in result["shared"]:
        parts.append(
            f"| {row['a']}, {row['b']} | {row['n_a']}, {row['n_b']} | {row['shared']} | "
            f"{row['expected']:.1f} | {row['p']:.2g} |"
        )
    about = (
        f"{result['n']} pairs of prompts for the methods, {result['draws']} shuffles of each kind, "
        f"{result['truth_prompts']} other pairs for the truths; {where(result['stamps'].values())} "
        f"([all numbers](../examples/real_circuits.json))."
    )
    return "\n".join([*parts, "", about])


def main() -> None:
    made = parser(__doc__, "real_circuits", 48)
    made.add_argument("--icl", required=True, help="folder with the relations")
    made.add_argument("--state", required=True, help="folder for what is finished")
    made.add_argument("--truth-prompts", type=int, default=64)
    made.add_argument("--draws", type=int, default=2)
    made.add_argument("--tasks", nargs="*", default=[*TASKS, *RELATIONS])
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    settings = dict(n=options.n, draws=options.draws, truth_prompts=options.truth_prompts)
    before = earlier(options, **settings)
    model = interp.load(MODEL, device="cpu")
    found = {name: one(model, name, options) for name in options.tasks}
    stamps = before.get("stamps", {}) | {name: stamp() for name in found}
    found = before.get("tasks", {}) | found
    found = {name: found[name] for name in (*TASKS, *RELATIONS) if name in found}
    result = dict(
        tasks=found, shared=shared(found, model.n_layers, model.n_heads), **settings,
        stamps={name: stamps[name] for name in found},
    )  # fmt: skip
    publish(result, render(result), options, BEGIN, END)


if __name__ == "__main__":
    main()
