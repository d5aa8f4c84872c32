"""HeadHunter on pocket-dit: heads whose guidance gives more dots, fewer dots, or purer colour.

    python examples/diffusion_checks.py --out examples/diffusion_checks.json

Writes the table of docs/methods.md. Heads are chosen on the noise of seed 0 and judged on other
seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import interp
from interp import diffusion, scenes

WEIGHT = 1.0
NAMES = list(scenes.DOT_COLORS)


def measured(pictures: torch.Tensor) -> dict[str, list[float]]:
    """Of each picture: how many dots, and how far the middles of their cells are from their class's
    colour (0 to √3, negated; of a picture without dots, of its whole)."""
    count, colour = [], []
    for i, picture in enumerate(pictures):
        drawn = picture.double().numpy()
        read = scenes.read_dots(drawn)
        count.append(float(len(read.cells)))
        wanted = np.array(list(scenes.DOT_COLORS.values())[i % len(NAMES)])
        cells = (drawn + 1).reshape(3, 3, 8, 3, 8)[
            :, :, 2:6, :, 2:6
        ] / 2  # (3, rows, 4, columns, 4)
        away = (
            np.linalg.norm(cells - wanted[:, None, None, None, None], axis=0).mean((1, 3)).ravel()
        )
        colour.append(-float(away[list(read.cells) or slice(None)].mean()))
    return {"count": count, "colour": colour}


OBJECTIVES: dict[str, Callable[[dict[str, list[float]]], list[float]]] = {
    "more dots": lambda m: m["count"],
    "fewer dots": lambda m: [-v for v in m["count"]],
    "colour": lambda m: m["colour"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--held-out", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = interp.load("dit")
    given = {"class_labels": torch.arange(args.pictures) % len(NAMES)}
    # each trial's pictures are measured in all three ways: what is drawn once is judged thrice
    drawn: dict[tuple[Any, int], dict[str, list[float]]] = {}

    def judged(edits: Sequence[Any], seed: int) -> dict[str, list[float]]:
        key = (tuple(str(h) for e in edits for h in e.heads), seed)
        if key not in drawn:
            drawn[key] = measured(
                diffusion.draw(
                    model, given, edits=edits, weight=WEIGHT, steps=args.steps, seed=seed
                )
            )
        return drawn[key]

    table: dict[str, Any] = {}
    for name, objective in OBJECTIVES.items():
        begun = time.perf_counter()
        found = diffusion.hunt(
            model,
            lambda edits, seed, objective=objective: objective(judged(edits, seed)),
            rounds=args.rounds,
            draws=args.draws,
            held_out=args.held_out,
            progress=True,
        )
        table[name] = dict(
            heads=[str(h) for h in found.heads],
            untouched=float(found.untouched.mean()),
            gain=vars(found.gain),
            random=[round(float(r), 4) for r in found.random],
            beats_random=found.beats_random,
            seconds=round(time.perf_counter() - begun, 1),
        )
        row = table[name]
        change = "– | –"
        if found.heads:
            change = f"{found.gain} | {min(row['random']):.2f} … {max(row['random']):.2f}"
        print(
            f"| {name} | {', '.join(row['heads']) or 'none'} | {row['untouched']:.2f} | {change} |"
        )
    if args.out:
        record = dict(
            pictures=args.pictures,
            steps=args.steps,
            weight=WEIGHT,
            rounds=args.rounds,
            date=str(date.today()),
            device="cpu",
            objectives=table,
        )
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
