"""What RITUAL+ and guidance by the image do to smol-llava, beside RITUAL.

    python examples/vision_options.py --state options/ --out examples/vision_options.json

The rows that `vision_table.py` has no room for, on fewer of its problems. RITUAL+ is also compared
with RITUAL, whose transformation is drawn, and with the one transformation that it takes most
often: what is left of a choice must beat both. Intervals: 95 %, paired by picture. With
--page docs/results.md the table goes between that page's markers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from published import change, interval, parser, publish, stamp, where
from vision_table import BATCH, TASKS, cell, with_processor

import interp
from interp.evaluation.pictures import Method, compare, plain
from interp.procedures.image_guidance import ImageGuidance
from interp.procedures.ritual import RITUAL
from interp.procedures.ritual_plus import RITUALPlus
from interp.vision.prompts import with_images
from interp_hooks import HookedModel

BEGIN, END = "<!-- vision options: begin -->", "<!-- vision options: end -->"
#: column → (task, metric, decimals)
SHOWN = {
    "CHAIR_I, noise": ("noise", "CHAIR_I", 3),
    "object F1, noise": ("noise", "object F1", 2),
    "words, noise": ("noise", "words", 1),
    "POPE accuracy, adversarial, noise": ("POPE adversarial", "accuracy", 3),
}
#: label → the row that it is a change from
AGAINST = {
    "RITUAL, drawn": "greedy",
    "RITUAL+": "greedy",
    "RITUAL, always color jitter": "greedy",
    "RITUAL+ less RITUAL, drawn": "RITUAL, drawn",
    "RITUAL+ less always color jitter": "RITUAL, always color jitter",
    "guidance, γ = 2": "greedy",
}


def methods() -> dict[str, Method]:
    """Every way of answering that is measured."""
    jitter = with_processor(lambda m, i: RITUAL(m, i, transforms=["color_jitter"]))
    return {
        "greedy": plain,
        "RITUAL, drawn": with_processor(RITUAL),
        "RITUAL+": with_processor(RITUALPlus),
        "RITUAL, always color jitter": jitter,
        "guidance, γ = 2": with_processor(ImageGuidance),
    }


def choices(model: HookedModel, task: str, n: int, seed: int) -> dict[str, int]:
    """How often RITUAL+ takes each transformation."""
    found: Counter[str] = Counter()
    problems = TASKS[task].problems(n, seed)
    for a in range(0, len(problems), BATCH):
        some = problems[a : a + BATCH]
        inputs = with_images(model, [p.prompt for p in some], [[p.image] for p in some])
        found.update(kind for kind, _ in RITUALPlus(model, inputs, kappa=0).complements)
    return dict(found.most_common())


def measure(
    n: int, seed: int, model: HookedModel | None = None, state: Path | None = None
) -> dict[str, Any]:
    """Every row on every task, and what RITUAL+ chose."""
    model = model or interp.load("smol-llava", dtype="bfloat16")
    rows: dict[str, dict[str, Any]] = {label: {} for label in ("greedy", *AGAINST)}
    chosen = {}
    for name in dict.fromkeys(task for task, _, _ in SHOWN.values()):
        task = TASKS[name]
        frames = {
            label: cell(model, name, label, method, n, seed, state)
            for label, method in methods().items()
        }
        for label, base in AGAINST.items():
            mine = label.split(" less ")[0]
            pair = compare(task, {base: frames[base], mine: frames[mine]}, seed)
            rows[label][name] = {metric: asdict(one) for metric, one in pair[mine].items()}
            if base == "greedy":
                rows[base][name] = {metric: asdict(one) for metric, one in pair[base].items()}
        chosen[name] = choices(model, name, n, seed)
    return dict(model=model.name, n=n, seed=seed, rows=rows, chosen=chosen, stamp=stamp())


def render_table(result: dict[str, Any]) -> str:
    """Markdown: greedy decoding as it is, the others as changes; bold where the interval leaves 0
    out."""
    lines = ["| | " + " | ".join(SHOWN) + " |", "|---|" + "---|" * len(SHOWN)]
    for label, cells in result["rows"].items():
        row = []
        for task, metric, digits in SHOWN.values():
            one = cells[task][metric]
            if one["difference"] is None:
                row.append(interval(one["baseline"], f"{{:.{digits}f}}".format))
            else:
                row.append(change(one["difference"], digits))
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    chose = "; ".join(
        f"{task}: " + ", ".join(f"{kind.replace('_', ' ')} {n}" for kind, n in counts.items())
        for task, counts in result["chosen"].items()
    )
    about = (
        f"{result['n']} problems a task; {where([result['stamp']])}, seed {result['seed']}; "
        "weights in bfloat16 ([all numbers](../examples/vision_options.json)). RITUAL+ chose "
        f"({chose})."
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    options = parser(__doc__, "vision_options", 100, threads=1)
    options.add_argument("--state", type=Path, help="a folder where finished cells are kept")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.n, arguments.seed, state=arguments.state)
    publish(result, render_table(result), arguments, BEGIN, END)


if __name__ == "__main__":
    main()
