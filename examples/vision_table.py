"""What published interventions do to smol-llava's hallucinations: POPE and CHAIR, each row beside
its random twin.

    python examples/vision_table.py --n 500 --state table/ --out examples/vision_table.json

Writes the JSON and prints the tables as markdown; with --page docs/results.md they go between that
page's markers. Settings are the published ones but where a row says another; nothing was tuned on
these problems. A twin does as much at random: other heads of the same layers, other patches. It is
drawn 20 times, the pictures take turns. Intervals: 95 %, paired by picture; against a twin the
draws are resampled, then the pictures of each. What is answered is kept in --state, so that a run
that is interrupted goes on; what --out holds of other tasks stays, so that each may have a run of
its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from published import change, earlier, interval, parser, publish, stamp, where

import interp
from interp.edits import VAR, VHR
from interp.edits.fit_paint import paint_for
from interp.edits.fit_vhr import select_heads, vhr_for, vhr_layers
from interp.edits.vhr import above_median
from interp.evaluation.pictures import Method, answers, compare, counted, plain, ratios, under
from interp.procedures.damro import DAMRO
from interp.procedures.ritual import RITUAL
from interp.procedures.route_gating import RouteGating
from interp.scenes import OBJECTS, question, render, usual
from interp.support.statistics import RESAMPLES
from interp.tasks.chair import Chair
from interp.tasks.images import ImageTask
from interp.tasks.pope import Pope
from interp.vision.prompts import with_images
from interp_hooks import Head, HookedModel
from interp_hooks.huggingface.images import image_mask

BEGIN, END = "<!-- vision table: begin -->", "<!-- vision table: end -->"
DRAWS = 20
BATCH = 100
#: of a caption: the longest true one has 31
TOKENS = 40
GAZE_HEADS = 16
#: the sources of hallucination, and what a cure may cost where nothing is wrong
TASKS: dict[str, ImageTask] = {
    "usual": Chair(world="usual"),
    "noise": Chair(damage="noise", level=2),
    "blur": Chair(damage="blur", level=2),
    "POPE random": Pope(split="random", damage="noise", each=1),
    "POPE popular": Pope(split="popular", damage="noise", each=1),
    "POPE adversarial": Pope(split="adversarial", damage="noise", each=1),
    "POPE leading": Pope(split="adversarial", leading=True, each=1),
}
#: column → (task, metric, decimals)
SHOWN = {
    "CHAIR_I, noise": ("noise", "CHAIR_I", 3),
    "CHAIR_I, blur": ("blur", "CHAIR_I", 3),
    "object F1, noise": ("noise", "object F1", 2),
    "object F1, usual": ("usual", "object F1", 2),
    "words, noise": ("noise", "words", 1),
    "POPE accuracy, adversarial, noise": ("POPE adversarial", "accuracy", 3),
    "POPE accuracy, leading": ("POPE leading", "accuracy", 3),
}


@dataclass(frozen=True)
class Row:
    """A method and, where it chooses heads or patches, the same with a random choice."""

    method: Method
    twin: Method | None = None


def from_prompt(make: Callable[[HookedModel, dict[str, torch.Tensor]], Any]) -> Method:
    """Greedy generation under edits that each batch of prompts gets anew."""

    def run(model: HookedModel, inputs: dict[str, torch.Tensor], new: int) -> torch.Tensor:
        edits = make(model, inputs)
        with model.edit(*(edits if isinstance(edits, tuple) else (edits,))):
            return plain(model, inputs, new)

    return run


def with_processor(make: Callable[[HookedModel, dict[str, torch.Tensor]], Any]) -> Method:
    """Greedy generation with a logits processor made for each batch of prompts."""

    def run(model: HookedModel, inputs: dict[str, torch.Tensor], new: int) -> torch.Tensor:
        return model.generate(
            **inputs, max_new_tokens=new, do_sample=False, logits_processor=[make(model, inputs)]
        )

    return run


class Twins:
    """Random choices: draw k is for the pictures k, k + 20, k + 40, … of a batch of 100."""

    def __init__(self, model: HookedModel, seed: int) -> None:
        self.model, self.seed = model, seed

    def generators(self, rows: int) -> list[np.random.Generator]:
        return [np.random.default_rng([self.seed, 77, row % DRAWS]) for row in range(rows)]

    def heads(self, counts: torch.Tensor) -> torch.Tensor:
        """(rows, layers, heads) bool: so many heads of each layer as `counts` (rows, layers)
        says, at random."""
        chosen = torch.zeros(*counts.shape, self.model.n_heads, dtype=torch.bool)
        for row, rng in enumerate(self.generators(len(counts))):
            order = [rng.permutation(self.model.n_heads) for _ in range(counts.shape[1])]
            for layer, n in enumerate(counts[row].tolist()):
                chosen[row, layer, order[layer][:n]] = True
        return chosen

    def patches(self, counts: torch.Tensor, images: int, patches: int) -> torch.Tensor:
        """(images, patches) bool: so many patches of each image, at random."""
        chosen = torch.zeros(images, patches, dtype=torch.bool)
        for row, rng in enumerate(self.generators(images)):
            chosen[row, rng.permutation(patches)[: int(counts[row])]] = True
        return chosen

    def keys(self, keys: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(batch, slots) bool: as many of the image's tokens as `keys` has, at random."""
        image = image_mask(self.model.module.config, inputs["input_ids"], inputs)
        assert image is not None
        count = keys.sum(1)
        moved = torch.zeros_like(keys)
        moved[image] = self.patches(count, len(keys), int(image[0].sum())).flatten()
        return moved


def of_set(heads: tuple[Head, ...], model: HookedModel, rows: int) -> torch.Tensor:
    """(rows, layers): how many of a fixed set's heads each layer has."""
    counts = torch.zeros(rows, model.n_layers, dtype=torch.int64)
    for head in heads:
        counts[:, head.layer] += 1
    return counts


def fixed_heads(model: HookedModel, seed: int, n: int = 100) -> tuple[Head, ...]:
    """One set for all pictures: VHR's rule on divergences averaged over usual scenes."""
    rng = np.random.default_rng([seed, 99])
    texts = [question(OBJECTS[rng.integers(len(OBJECTS))]) for _ in range(n)]
    found = select_heads(model, with_images(model, texts, [[render(usual(rng))] for _ in texts]))
    chosen = above_median(found.divergence.mean(0), found.text_activation.mean(0))
    return tuple(Head(la, h) for la, h in chosen.nonzero().tolist() if la in vhr_layers(model))


def var_counts(scores: pd.DataFrame, model: HookedModel) -> tuple[int, ...]:
    """Heads of each layer that VAR edits in a word, on average: the sum of image_centric."""
    sums = scores.groupby("layer").image_centric.sum().reindex(range(model.n_layers)).fillna(0)
    return tuple(int(n) for n in sums.round())


def vhr_row(twins: Twins, **how: Any) -> Row:
    """VHR with these settings of `vhr_for`, and as many random heads of the same layers."""

    def twin(m: HookedModel, inputs: dict[str, torch.Tensor]) -> VHR:
        counts = select_heads(m, inputs, **how).selected.sum(-1)
        return VHR(alpha=how.get("alpha", 2.0), selected=twins.heads(counts))

    return Row(from_prompt(lambda m, inputs: vhr_for(m, inputs, **how)), from_prompt(twin))


def rows_of(model: HookedModel, scores: pd.DataFrame, seed: int) -> dict[str, Row]:
    """Every row of the table. `scores`: of a scan, `gaze` and `image_centric` by head."""
    twins = Twins(model, seed)

    def gained(heads: tuple[Head, ...], alpha: float) -> Row:
        def twin(m: HookedModel, inputs: dict[str, torch.Tensor]) -> VHR:
            counts = of_set(heads, m, len(inputs["input_ids"]))
            return VHR(alpha=alpha, selected=twins.heads(counts))

        return Row(under(VHR(heads, alpha)), from_prompt(twin))

    def var(preset: str) -> Row:
        counts = var_counts(scores, model)

        def twin(m: HookedModel, inputs: dict[str, torch.Tensor], new: int) -> torch.Tensor:
            """A draw at a time: VAR's heads are a batch's, not a sample's."""
            said: list[torch.Tensor] = []
            n = len(inputs["input_ids"])
            for k in range(min(DRAWS, n)):
                rng = np.random.default_rng([seed, 77, k])
                heads = tuple(Head(la, int(h)) for la, c in enumerate(counts)
                              for h in rng.permutation(m.n_heads)[:c])  # fmt: skip
                rows = list(range(k, n, DRAWS))
                part = {name: value[rows] for name, value in inputs.items()}
                rho = 1.0 if preset == "code" else 0.0
                with m.edit(VAR(heads=heads, preset=preset, rho=rho, image_mass=0.0)):
                    said += list(plain(m, part, new))
            order = [i for k in range(DRAWS) for i in range(k, n, DRAWS)]
            width = max(len(row) for row in said)
            end = m.tokenizer.pad_token_id
            out = torch.full((n, width), end)
            for i, row in zip(order, said, strict=True):
                out[i, : len(row)] = row
            return out

        return Row(under(VAR(preset=preset)), twin)

    def paint(alpha: float) -> Row:
        def twin(m: HookedModel, inputs: dict[str, torch.Tensor]) -> tuple[Any, ...]:
            return tuple(
                replace(e, keys=twins.keys(e.keys, inputs))
                for e in paint_for(m, inputs, alpha=alpha)
            )

        return Row(from_prompt(lambda m, inputs: paint_for(m, inputs, alpha=alpha)),
                   from_prompt(twin))  # fmt: skip

    def damro() -> Row:
        def twin(m: HookedModel, inputs: dict[str, torch.Tensor]) -> DAMRO:
            image = image_mask(m.module.config, inputs["input_ids"], inputs)
            assert image is not None
            n = len(inputs["input_ids"])
            counts = torch.full((n,), 10)
            return DAMRO(m, inputs, outliers=twins.patches(counts, n, int(image[0].sum())))

        return Row(with_processor(DAMRO), with_processor(twin))

    def gating(scale: float) -> Row:
        return Row(with_processor(lambda m, inputs: RouteGating(m, inputs, scale)))

    best = scores.sort_values("gaze", ascending=False).head(GAZE_HEADS)
    gaze = tuple(Head(int(la), int(h)) for la, h in zip(best.layer, best["head"], strict=True))
    last = tuple(range(model.n_layers - 4, model.n_layers))
    return {
        "VHR, α = 2": vhr_row(twins),
        "VHR without the guard": vhr_row(twins, guard=False),
        "VHR, one fixed set": gained(fixed_heads(model, seed), 2.0),
        "VHR, α = 1.2": vhr_row(twins, alpha=1.2),
        "VHR, α = 1.5": vhr_row(twins, alpha=1.5),
        "VHR, α = 2, last 4 layers": vhr_row(twins, layers=last),
        "VAR, paper": var("paper"),
        "VAR, code": var("code"),
        "PAINT, α = 0.7, β = 0.35": paint(0.7),
        "DAMRO, α = 2, k = 10": damro(),
        "RITUAL, κ = 3": Row(with_processor(RITUAL)),
        "route gating, λ = 0.5": gating(0.5),
        f"top {GAZE_HEADS} gaze heads × 1.5": gained(gaze, 1.5),
        f"top {GAZE_HEADS} gaze heads × 2": gained(gaze, 2.0),
    }


def resampled(groups: int, seed: int) -> np.ndarray:
    """(draws, groups) how often each picture counts: the 20 random choices are resampled, then the
    pictures of each; picture g had choice g mod 20."""
    rng = np.random.default_rng([seed, 3])
    weights = np.zeros((RESAMPLES, groups))
    for row in weights:
        for choice in rng.integers(0, DRAWS, DRAWS):
            mine = np.arange(choice, groups, DRAWS)
            np.add.at(row, rng.choice(mine, len(mine)), 1)
    return weights


def against(
    task: ImageTask, method: pd.DataFrame, twin: pd.DataFrame, seed: int
) -> dict[str, dict[str, float]]:
    """metric → method − twin with its interval."""
    groups = method.group.nunique()
    if groups == len(method):  # a problem a picture
        weights = resampled(groups, seed)
    else:  # several questions a picture, each with another draw
        rng = np.random.default_rng([seed, 3])
        weights = rng.multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)
    found = {}
    for metric in task.metrics:
        difference = ratios(task, method, weights)[metric] - ratios(task, twin, weights)[metric]
        mean = float(ratios(task, method)[metric][0] - ratios(task, twin)[metric][0])
        low, high = np.quantile(difference, [0.025, 0.975])
        found[metric] = dict(mean=mean, low=float(low), high=float(high), n=groups)
    return found


def scan_scores(model: HookedModel, state: Path | None) -> pd.DataFrame:
    """Gaze and image-centric share by head, on scenes that the tasks don't have."""
    kept = state / "scores.parquet" if state else None
    if kept and kept.is_file():
        return pd.read_parquet(kept)
    atlas = interp.scan_heads(model, scores="gaze,image_centric", samples=64, seed=1234)
    frame = atlas.frame[atlas.frame.tower == model.main_tower].reset_index(drop=True)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(kept)
    return frame


def cell(
    model: HookedModel, name: str, label: str, method: Method, n: int, seed: int, state: Path | None
) -> pd.DataFrame:
    """What is counted of each answer; kept, and read again where it is."""
    task = TASKS[name]
    kept = state / f"{name} {label} {n} {seed}.parquet".replace("/", " ") if state else None
    if kept and kept.is_file():
        return pd.read_parquet(kept)
    start, problems = time.time(), task.problems(n, seed)
    said = answers(model, problems, method, min(TOKENS, task.max_new_tokens), batch=BATCH)
    frame = counted(task, problems, said)
    print(f"{name}: {label} ({time.time() - start:.0f} s)", flush=True)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(kept)
    return frame


def measure(
    n: int,
    seed: int,
    model: HookedModel | None = None,
    only: list[str] | None = None,
    tasks: list[str] | None = None,
    state: Path | None = None,
) -> dict[str, Any]:
    """Every task under every method and its twin."""
    model = model or interp.load("smol-llava", dtype="bfloat16")
    rows = rows_of(model, scan_scores(model, state), seed)
    rows = {k: v for k, v in rows.items() if only is None or k in only}
    methods: dict[str, dict[str, Any]] = {name: {} for name in ("greedy", *rows)}
    twins: dict[str, dict[str, Any]] = {name: {} for name, row in rows.items() if row.twin}
    for name in tasks or TASKS:
        task = TASKS[name]
        frames = {"greedy": cell(model, name, "greedy", plain, n, seed, state)}
        for label, row in rows.items():
            frames[label] = cell(model, name, label, row.method, n, seed, state)
            if row.twin:
                twin = cell(model, name, f"{label}, twin", row.twin, n, seed, state)
                twins[label][name] = dict(
                    against=against(task, frames[label], twin, seed),
                    twin={m: float(v[0]) for m, v in ratios(task, twin).items()},
                )
        for label, found in compare(task, frames, seed).items():
            methods[label][name] = {metric: asdict(one) for metric, one in found.items()}
    return dict(
        model=model.name, n=n, seed=seed, draws=DRAWS, methods=methods, twins=twins,
        stamps={name: stamp() for name in tasks or TASKS},
    )  # fmt: skip


def joined(before: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """`result` with the tasks that were measured before and are not in it."""
    if not before:
        return result
    stamps = before["stamps"] | result["stamps"]
    order = [name for name in TASKS if name in stamps]

    def cells(kind: str) -> dict[str, Any]:
        found = {}
        for label in dict.fromkeys([*before[kind], *result[kind]]):
            there = before[kind].get(label, {}) | result[kind].get(label, {})
            found[label] = {name: there[name] for name in order if name in there}
        return found

    return result | {
        "methods": cells("methods"),
        "twins": cells("twins"),
        "stamps": {name: stamps[name] for name in order},
    }


def render_table(result: dict[str, Any]) -> str:
    """Markdown: greedy decoding as it is and the others as changes; then each method less its
    random twin. Bold where the interval leaves 0 out."""
    shown = {c: w for c, w in SHOWN.items() if w[0] in result["methods"]["greedy"]}
    head = ["| | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    changes, less = list(head), list(head)
    for label, cells in result["methods"].items():
        row = []
        for task, metric, digits in shown.values():
            one = cells[task][metric]
            if one["difference"] is None:
                row.append(interval(one["baseline"], f"{{:.{digits}f}}".format))
            else:
                row.append(change(one["difference"], digits))
        changes.append(f"| {label} | " + " | ".join(row) + " |")
        if twin := result["twins"].get(label):
            differences = [
                change(twin[task]["against"][metric], digits)
                for task, metric, digits in shown.values()
            ]
            less.append(f"| {label} | " + " | ".join(differences) + " |")
    about = (
        f"{result['n']} problems a task; {where(result['stamps'].values())}, seed "
        f"{result['seed']}; weights in bfloat16 ([all numbers](../examples/vision_table.json))."
    )
    return "\n".join(
        [
            "Changes from greedy decoding:", "", *changes, "",
            f"The same less the random twin ({result['draws']} draws):", "", *less, "", about,
        ]
    )  # fmt: skip


def short(result: dict[str, Any]) -> str:
    """Markdown for the README: noisy pictures alone, each method beside its random twin."""
    lines = [
        "| | CHAIR_I | less its random twin | object F1 | less its random twin |",
        "|---|---|---|---|---|",
    ]
    for label, cells in result["methods"].items():
        row, twin = [], result["twins"].get(label)
        for metric in ("CHAIR_I", "object F1"):
            one = cells["noise"][metric]
            row.append(
                interval(one["baseline"], "{:.2f}".format)
                if one["difference"] is None
                else change(one["difference"], 2)
            )
            row.append(change(twin["noise"]["against"][metric], 2) if twin else "")
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "vision_table", 500)
    options.add_argument("--tasks", nargs="*", help=f"of {', '.join(TASKS)}")
    options.add_argument("--only", nargs="*", help="methods by name")
    options.add_argument("--state", type=Path, help="a folder where finished cells are kept")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    before = earlier(arguments, n=arguments.n, seed=arguments.seed, draws=DRAWS)
    result = measure(
        arguments.n,
        arguments.seed,
        only=arguments.only,
        tasks=arguments.tasks,
        state=arguments.state,
    )
    result = joined(before, result)
    publish(result, render_table(result), arguments, BEGIN, END)


if __name__ == "__main__":
    main()
