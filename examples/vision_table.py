"""What interventions do to pocket-llava's hallucinations: POPE and CHAIR on scenes that break its
expectations.

    python examples/vision_table.py --n 300 --out examples/vision_table.json

Writes the JSON and prints the table as markdown; with --page docs/results.md it goes between that
page's markers. Broken scenes lack the companions that training scenes had; usual ones show what an
intervention costs where nothing was wrong. Settings are the published ones; nothing was tuned here.
Intervals: 95 %, resampled by picture, paired with greedy decoding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edit_table import _change, _cpu, _interval, put

import interp
from interp.edits import VAR, VHR
from interp.edits.fit_paint import paint_for
from interp.edits.fit_vhr import select_heads, vhr_for, vhr_layers
from interp.edits.vhr import above_median
from interp.evaluation.pictures import Method, answers, compare, counted, plain, under
from interp.procedures.cca import CCA
from interp.procedures.damro import DAMRO
from interp.procedures.ritual import RITUAL
from interp.scenes import OBJECTS, question, render, usual
from interp.tasks.chair import Chair
from interp.tasks.images import ImageTask
from interp.tasks.pope import Pope
from interp.vision.prompts import with_images
from interp_hooks import Head, HookedModel

BEGIN, END = "<!-- vision table: begin -->", "<!-- vision table: end -->"
#: column → (task, metric, decimals)
SHOWN = {
    "POPE F1, broken": ("pope broken", "F1"),
    "POPE accuracy, adversarial": ("pope adversarial", "accuracy"),
    "CHAIR_I, broken": ("chair broken", "CHAIR_I"),
    "CHAIR_S, broken": ("chair broken", "CHAIR_S"),
    "object F1, broken": ("chair broken", "object F1"),
    "POPE F1, usual": ("pope usual", "F1"),
    "object F1, usual": ("chair usual", "object F1"),
    "words, broken": ("chair broken", "words"),
}


def tasks_of() -> dict[str, ImageTask]:
    return {
        "pope broken": Pope(),
        "pope adversarial": Pope(split="adversarial"),
        "pope usual": Pope(world="usual"),
        "chair broken": Chair(),
        "chair usual": Chair(world="usual"),
    }


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


def concentric(model: HookedModel, inputs: dict[str, torch.Tensor], new: int) -> torch.Tensor:
    with CCA().on(model):
        return plain(model, inputs, new)


def fixed_heads(model: HookedModel, seed: int, n: int = 32) -> tuple[Head, ...]:
    """One set for all pictures: VHR's rule on divergences averaged over usual scenes."""
    rng = np.random.default_rng([seed, 99])
    texts = [question(OBJECTS[rng.integers(len(OBJECTS))]) for _ in range(n)]
    found = select_heads(model, with_images(model, texts, [[render(usual(rng))] for _ in texts]))
    chosen = above_median(found.divergence.mean(0), found.text_activation.mean(0))
    return tuple(Head(la, h) for la, h in chosen.nonzero().tolist() if la in vhr_layers(model))


def random_heads(model: HookedModel, seed: int) -> tuple[Head, ...]:
    """As many heads a layer as VHR takes, drawn at random."""
    rng = np.random.default_rng([seed, 77])
    return tuple(
        Head(la, int(h))
        for la in vhr_layers(model)
        for h in rng.permutation(model.n_heads)[: model.n_heads // 2]
    )


def methods(model: HookedModel, seed: int) -> dict[str, Method]:
    def vhr(**how: Any) -> Method:
        return from_prompt(lambda m, inputs: vhr_for(m, inputs, **how))

    return {
        "greedy": plain,
        "VHR, α = 2": vhr(),
        "VHR without the guard": vhr(guard=False),
        "VHR, one fixed set": under(VHR(fixed_heads(model, seed), 2.0)),
        "random heads × 2": under(VHR(random_heads(model, seed), 2.0)),
        "VHR, α = 0.5": vhr(alpha=0.5),
        "VHR, α = 3": vhr(alpha=3.0),
        "VHR, α = 4": vhr(alpha=4.0),
        "VAR, paper": under(VAR(dims="auto")),
        "VAR, code": under(VAR(dims="auto", preset="code")),
        "PAINT, α = 0.7, β = 0.35": from_prompt(lambda m, inputs: paint_for(m, inputs)),
        "PAINT, α = 0.5, β = 0.35": from_prompt(lambda m, inputs: paint_for(m, inputs, alpha=0.5)),
        "DAMRO, α = 2, k = 10": with_processor(lambda m, inputs: DAMRO(m, inputs)),
        "RITUAL, κ = 3": with_processor(lambda m, inputs: RITUAL(m, inputs)),
        "CCA, untrained for it": concentric,
    }


def measure(
    n: int, seed: int, model: HookedModel | None = None, only: list[str] | None = None
) -> dict[str, Any]:
    """Every task under every method."""
    model = model or interp.load("llava")
    ways = {k: v for k, v in methods(model, seed).items() if only is None or k in ("greedy", *only)}
    cells: dict[str, dict[str, Any]] = {name: {} for name in ways}
    for name, task in tasks_of().items():
        problems = task.problems(n, seed)
        frames = {}
        for label, way in ways.items():
            start = time.time()
            frames[label] = counted(
                task, problems, answers(model, problems, way, task.max_new_tokens)
            )
            print(f"{name}: {label} ({time.time() - start:.0f} s)", flush=True)
        for label, found in compare(task, frames, seed).items():
            cells[label][name] = {metric: asdict(one) for metric, one in found.items()}
    return dict(
        model=model.name, n=n, seed=seed, methods=cells, date=time.strftime("%Y-%m-%d"),
        machine=f"{_cpu()}, threads: {torch.get_num_threads()}",
        versions={p: version(p) for p in ("torch", "transformers", "interp")},
    )  # fmt: skip


def render_table(result: dict[str, Any]) -> str:
    """Markdown: greedy decoding as it is, the others as changes; bold where the interval leaves 0
    out."""
    lines = ["| | " + " | ".join(SHOWN) + " |", "|---|" + "---|" * len(SHOWN)]
    for label, cells in result["methods"].items():
        row = []
        for task, metric in SHOWN.values():
            one, digits = cells[task][metric], 1 if metric == "words" else 2
            if one["difference"] is None:
                row.append(_interval(one["baseline"], f"{{:.{digits}f}}".format))
            else:
                row.append(_change(one["difference"], digits))
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    about = (
        f"{result['n']} problems a task; {result['machine']}, {result['date']}, seed "
        f"{result['seed']}, float32"
    )
    return "\n".join([*lines, "", f"{about} ([all numbers](../examples/vision_table.json))."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=300, help="questions, and captions, a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="examples/vision_table.json")
    parser.add_argument("--page", help="a page to put the table into: docs/results.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.n, arguments.seed)
    Path(arguments.out).write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(render_table(result))
    if arguments.page:
        page = Path(arguments.page)
        page.write_text(
            put(page.read_text(encoding="utf-8"), render_table(result), BEGIN, END),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
