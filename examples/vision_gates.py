"""Is there anything to cure? Visual sinks of smol-llava, and how much it makes up from each source
of hallucination: the two gates before a table of cures.

    python examples/vision_gates.py --n 500 --out examples/vision_gates.json

Writes the JSON and prints the tables as markdown; with --page docs/results.md they go between that
page's markers. Intervals: 95 %, resampled by picture.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from published import interval, parser, publish, stamp

import interp
from interp import scenes
from interp.evaluation.pictures import answers, compare, counted, plain
from interp.inputs.forward import forward
from interp.scenes.damage import KINDS, LEVELS
from interp.scenes.words import DESCRIBE
from interp.support.statistics import Interval
from interp.tasks.chair import Chair
from interp.tasks.images import ImageTask
from interp.tasks.pope import Pope
from interp.vision.prompts import with_images
from interp.vision.sinks import find_sinks
from interp_hooks import HookedModel
from interp_hooks.huggingface.images import image_mask
from interp_kernels import Received

#: of a caption: the longest true one has 31
TOKENS = 40
BEGIN, END = "<!-- vision gates: begin -->", "<!-- vision gates: end -->"


def sources() -> dict[str, ImageTask]:
    """name → captions or questions that something may lead astray; usual scenes, but for
    "broken"."""
    chairs: dict[str, ImageTask] = {
        "usual": Chair(world="usual"),
        "broken": Chair(),
        "begun with what is there": Chair(world="usual", begun="true"),
        "begun with what is not": Chair(begun="false"),
    }
    for kind in KINDS:
        for level in LEVELS:
            chairs[f"{kind} {level}"] = Chair(damage=kind, level=level)
    popes: dict[str, ImageTask] = {
        f"POPE, {split}": Pope(split=split) for split in ("random", "popular", "adversarial")
    }
    for kind in KINDS:
        popes[f"POPE, adversarial, {kind} 2"] = Pope(split="adversarial", damage=kind)
    popes["POPE, leading"] = Pope(split="adversarial", leading=True)
    return chairs | popes


def rates(model: HookedModel, task: ImageTask, n: int, seed: int) -> dict[str, Any]:
    """The task's metrics under greedy decoding, with intervals."""
    problems = task.problems(n, seed)
    said = answers(model, problems, plain, min(TOKENS, task.max_new_tokens), batch=100)
    frame = counted(task, problems, said)
    found = compare(task, {"greedy": frame}, seed)["greedy"]
    return {metric: asdict(one.baseline) for metric, one in found.items()}


@torch.no_grad()
def sinks(model: HookedModel, n: int, seed: int, batch: int = 25) -> dict[str, Any]:
    """Visual sinks at the published τ on n usual scenes: by layer the share of pictures that have
    one and the attention of the prompt's last token on them and on the first token, means over
    heads; the share with one in any layer; how often a sink is background."""
    layers, rng = model.n_layers, np.random.default_rng([seed, 7])
    has = np.zeros((layers, 0), dtype=bool)
    per_picture, on_sinks, on_first, background = [], [], [], []
    places: Counter[int] = Counter()
    for _ in range(0, n, batch):
        shown = [scenes.usual(rng) for _ in range(batch)]
        inputs = with_images(model, [DESCRIBE] * batch, [[scenes.render(s)] for s in shown])
        ids = inputs["input_ids"]
        image = image_mask(model.module.config, ids, inputs)
        assert image is not None
        rows = torch.zeros_like(ids, dtype=torch.bool)
        rows[:, -1] = True
        more = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        with (
            model.capture_resid() as stream,
            model.observe(received={"last": Received(rows, reduce="sum")}) as seen,
        ):
            forward(model, ids, inputs["attention_mask"], keep=1, **more)
        first = torch.zeros(batch, dtype=torch.long)
        things = occupied(shown, int(image[0].sum()))
        marked = torch.stack(
            [
                find_sinks(model, stream["pre", la], first, None, image)[0] & image
                for la in range(layers)
            ]
        )  # (layers, batch, slots)
        rows_of = torch.stack(
            [seen[model.main_tower, la].received_by("last").mean(1) for la in range(layers)]
        )
        has = np.concatenate([has, marked.any(-1).numpy()], 1)
        on_sinks.append((rows_of * marked).sum(-1).numpy())
        on_first.append(rows_of[..., 0].numpy())
        patches = marked[:, image].view(layers, batch, -1)
        per_picture.append(patches.sum(-1).numpy())
        places.update(patches.any(0).nonzero()[:, 1].tolist())
        background += (~things[None].expand_as(patches))[patches].tolist()
    weights, count = np.concatenate(on_sinks, 1), np.concatenate(per_picture, 1)
    return dict(
        pictures=has.shape[1],
        any_layer=asdict(share(has.any(0))),
        by_layer=has.mean(1).round(4).tolist(),
        sinks_where_there=float(count[count > 0].mean()) if (count > 0).any() else 0.0,
        attention_where_there=float(weights[has].mean()) if has.any() else 0.0,
        attention_by_layer=[
            float(w[h].mean()) if h.any() else 0.0 for w, h in zip(weights, has, strict=True)
        ],
        first_by_layer=np.concatenate(on_first, 1).mean(1).round(4).tolist(),
        patches={str(p): n / has.shape[1] for p, n in places.most_common(5)},
        background=float(np.mean(background)) if background else None,
        background_of_all=float(np.mean(1 - occupied_share(n, seed))),
    )


def occupied(shown: list[scenes.Scene], patches: int) -> torch.Tensor:
    """(scenes, patches) bool: patches of cells that hold a thing; the grid is square."""
    side = round(patches**0.5)
    cell = [3 * (p // side * 3 // side) + p % side * 3 // side for p in range(patches)]
    return torch.tensor([[c in {t.cell for t in s.things} for c in cell] for s in shown])


def occupied_share(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 7])
    return np.array([len(scenes.usual(rng).things) / 9 for _ in range(n)])


def share(hits: np.ndarray) -> Interval:
    """A share with its interval by the normal approximation of Wilson."""
    n, p, z = len(hits), float(np.mean(hits)), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, float(middle - half), float(middle + half), n)


def render_table(result: dict[str, Any]) -> str:
    """Markdown: a row a source."""
    lines = ["| captions | CHAIR_I | CHAIR_S | object F1 |", "|---|---|---|---|"]
    asks = ["| questions (broken scenes) | accuracy | F1 | share of yes |", "|---|---|---|---|"]
    for name, found in result["sources"].items():
        rows, metrics = (
            (lines, ("CHAIR_I", "CHAIR_S", "object F1"))
            if "CHAIR_I" in found
            else (asks, ("accuracy", "F1", "share of yes"))
        )
        cells = [interval(found[m], "{:.2f}".format) for m in metrics]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    s = result["sinks"]
    best = int(np.argmax(s["by_layer"]))
    about = (
        f"Visual sinks at τ = 20: {s['any_layer']['mean']:.0%} of {s['pictures']} usual pictures "
        f"have one in some layer ({s['by_layer'][best]:.0%} in layer {best}), "
        f"{s['sinks_where_there']:.1f} patches where there is one, with "
        f"{s['attention_where_there']:.1%} of the attention of the prompt's last token"
    )
    if s["background"] is not None:
        about += (
            f"; {s['background']:.0%} of them are background "
            f"({s['background_of_all']:.0%} of all patches are)"
        )
    if s["patches"]:
        where = ", ".join(f"{p} in {n:.0%}" for p, n in s["patches"].items())
        about += f". By patch, counted from 0 line by line, and share of pictures: {where}"
    date = (
        f"{result['n']} problems a row; {result['machine']}, {result['date']}, seed "
        f"{result['seed']}; weights in bfloat16 ([all numbers](../examples/vision_gates.json))."
    )
    return "\n".join([about + ".", "", *lines, "", *asks, "", date])


def main() -> None:
    options = parser(__doc__, "vision_gates", 500)
    options.add_argument("--model", default="smol-llava")
    options.add_argument("--only", nargs="*", help="sources by name")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    model = interp.load(arguments.model, dtype="bfloat16")
    found: dict[str, Any] = {}
    for name, task in sources().items():
        if arguments.only is not None and name not in arguments.only:
            continue
        start = time.time()
        found[name] = rates(model, task, arguments.n, arguments.seed)
        numbers = {m: round(v["mean"], 3) for m, v in found[name].items()}
        print(f"{name} ({time.time() - start:.0f} s): {numbers}", flush=True)
    result = dict(
        model=model.name, n=arguments.n, seed=arguments.seed,
        sinks=sinks(model, arguments.n, arguments.seed), sources=found,
        **stamp(),
    )  # fmt: skip
    publish(result, render_table(result), arguments, BEGIN, END)


if __name__ == "__main__":
    main()
