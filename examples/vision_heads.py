"""Which heads of smol-llava see, and do they matter? The heads that stand highest on each score,
their overlaps, and what captions and text lose without them, beside random heads.

    python examples/vision_heads.py --out examples/vision_heads.json

Zeroes the top 16 heads of each score, and 20 random draws of as many heads of the same layers, and
measures the loss of true captions (nats a token, teacher-forced), the F1 of the objects of greedy
captions, and on text alone the loss of a second reading of 32 random words (induction). Writes the
JSON and prints the tables as markdown; with --page docs/results.md they go between that page's
markers.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from published import interval, parser, publish, stamp

import interp
from interp.edits import VHR
from interp.evaluation.pictures import counted, plain, ratios
from interp.inputs.forward import forward
from interp.scenes import caption, render, usual
from interp.scenes.words import DESCRIBE
from interp.scores.gaze import auc
from interp.support.statistics import bootstrap
from interp.tasks.chair import Chair
from interp.vision.prompts import with_images
from interp_hooks import HookedModel
from interp_hooks.huggingface.images import image_mask
from interp_kernels import Received

BEGIN, END = "<!-- vision heads: begin -->", "<!-- vision heads: end -->"
TOP, DRAWS = 16, 20
#: of a caption: the longest true one has 31
TOKENS = 40
#: score → what its heads do; the last two are read on text alone
SCORES = {
    "gaze": "look at the thing that is named next",
    "image_retrieval": "look from a question at the thing asked about",
    "image_mass": "give the image most attention",
    "vhd": "change most when the image is taken away",
    "visual_sink": "look at the visual sinks",
    "visual_nonsink_ratio": "look past the visual sinks",
    "induction": "continue a repeated text",
    "retrieval_forced": "copy an answer out of a text",
}


def scan(model: HookedModel, samples: int, seed: int) -> pd.DataFrame:
    """Every score by head."""
    atlas = interp.scan_heads(
        model, scores=",".join(SCORES), samples=samples, seed=seed, context=512
    )
    return text_heads(atlas, model)


def text_heads(atlas: interp.Atlas, model: HookedModel) -> pd.DataFrame:
    """The rows of a scan that are of the language model."""
    return atlas.frame[atlas.frame.tower == model.main_tower].reset_index(drop=True)


def top(scores: pd.DataFrame, name: str) -> list[tuple[int, int]]:
    best = scores.dropna(subset=[name]).sort_values(name, ascending=False).head(TOP)
    return [(int(la), int(h)) for la, h in zip(best.layer, best["head"], strict=True)]


def drawn(heads: list[tuple[int, int]], model: HookedModel, seed: int) -> torch.Tensor:
    """(1 + draws, layers, heads) bool: the set, then as many heads of the same layers at random.
    A draw may hold heads of the set: where it takes most of a layer there are no others."""
    sets = torch.zeros(1 + DRAWS, model.n_layers, model.n_heads, dtype=torch.bool)
    for layer, head in heads:
        sets[0, layer, head] = True
    counts = sets[0].sum(-1).tolist()
    for draw in range(DRAWS):
        rng = np.random.default_rng([seed, draw])
        for layer, n in enumerate(counts):
            sets[1 + draw, layer, rng.permutation(model.n_heads)[:n]] = True
    return sets


@torch.no_grad()
def looking(model: HookedModel, n: int, seed: int) -> list[dict[str, Any]]:
    """Where the heads with the highest gaze look while a thing is about to be named, over n usual
    scenes: `patches`, the score's AUC of the thing's patches against the others; `cells`, the same
    when the weights of each cell's patches are summed, since a head that looks at one of a thing's
    four patches looks at the thing; `share`, the thing's part of the weight on the image."""
    by_scene: list[np.ndarray] = []  # (measures, heads), a mean over the scene's things
    for i in range(n):
        scene = usual(np.random.default_rng([seed, 8, i]))
        words = caption(scene).split()
        inputs = with_images(model, [f"{DESCRIBE} {caption(scene)}"], [[render(scene)]])
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        image = image_mask(model.module.config, ids, inputs)
        assert image is not None
        start = ids.shape[1] - len(words)  # every word of a caption is one token
        asked, things = {}, {t.name: t for t in scene.things}
        for k, word in enumerate(words):
            if word in things:
                row = torch.zeros_like(ids, dtype=torch.bool)
                row[0, start + k - 1] = True
                asked[word] = Received(row, reduce="sum")
        with model.observe(received=asked) as seen:
            forward(model, ids, mask, keep=1, pixel_values=inputs["pixel_values"])
        side = round(int(image.sum()) ** 0.5)
        cell = torch.tensor([3 * (p // side * 3 // side) + p % side * 3 // side
                             for p in range(side * side)])  # fmt: skip
        measures = []
        for name in asked:
            layers = [seen[model.main_tower, la].received_by(name) for la in range(model.n_layers)]
            rows = torch.cat([x[0][:, image[0]] for x in layers]).double()  # (all heads, patches)
            gold = cell == things[name].cell
            cells = torch.zeros(len(rows), 9, dtype=torch.double).index_add_(1, cell, rows)
            its = torch.arange(9) == things[name].cell
            share = rows[:, gold].sum(1) / rows.sum(1)
            measures.append(torch.stack([auc(rows[:, gold], rows[:, ~gold]),
                                         auc(cells[:, its], cells[:, ~its]), share]))  # fmt: skip
        by_scene.append(torch.stack(measures).mean(0).numpy())
    values = np.stack(by_scene)  # (scenes, measures, heads)
    best = np.argsort(-values[:, 0].mean(0))[:8]
    return [
        dict(
            head=f"L{int(k) // model.n_heads}H{int(k) % model.n_heads}",
            **{
                what: asdict(bootstrap(values[:, j, k].tolist()))
                for j, what in enumerate(("patches", "cells", "share"))
            },
        )
        for k in best
    ]


def zeroed(sets: torch.Tensor) -> VHR:
    """z ← 0 in the set of each row of a batch."""
    return VHR(alpha=0.0, selected=sets, scope="all")


@torch.no_grad()
def caption_loss(model: HookedModel, sets: torch.Tensor, n: int, seed: int) -> np.ndarray:
    """(sets, pictures): nats a token of the true caption, the end among them."""
    losses = []
    for i in range(n):
        scene = usual(np.random.default_rng([seed, 5, i]))
        text = f"{DESCRIBE} {caption(scene)}{model.tokenizer.eos_token}"
        inputs = with_images(model, [text], [[render(scene)]])
        prompt = with_images(model, [DESCRIBE], [[render(scene)]])["input_ids"].shape[1]
        rows = {k: v.expand(len(sets), *v.shape[1:]) for k, v in inputs.items()}
        ids, mask = rows.pop("input_ids"), rows.pop("attention_mask")
        keep = ids.shape[1] - prompt + 1
        with model.edit(zeroed(sets)):
            logits = forward(model, ids, mask, keep=keep, **rows).logits[:, -keep:-1]
        target = ids[:, prompt:]
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), target.flatten(), reduction="none"
        )
        losses.append(loss.view(len(sets), -1).mean(1).numpy())
    return np.stack(losses, 1)


@torch.no_grad()
def caption_f1(model: HookedModel, sets: torch.Tensor, n: int, seed: int) -> np.ndarray:
    """(sets,): F1 of the objects that greedy captions of n usual scenes name."""
    task = Chair(world="usual")
    problems = task.problems(n, 1000 + seed)
    said: list[list[str]] = [[] for _ in sets]
    for problem in problems:
        inputs = with_images(model, [problem.prompt], [[problem.image]])
        rows = {k: v.expand(len(sets), *v.shape[1:]).contiguous() for k, v in inputs.items()}
        with model.edit(zeroed(sets)):
            ids = plain(model, rows, TOKENS)[:, inputs["input_ids"].shape[1] :]
        for texts, one in zip(said, model.tokenizer.batch_decode(ids, True), strict=True):
            texts.append(one)
    return np.array([float(ratios(task, counted(task, problems, s))["object F1"][0]) for s in said])


@torch.no_grad()
def repeat_loss(model: HookedModel, sets: torch.Tensor, n: int, seed: int) -> np.ndarray:
    """(sets, texts): nats a token of the second reading of 32 random tokens, no image."""
    losses = []
    for i in range(n):
        rng = np.random.default_rng([seed, 6, i])
        words = torch.from_numpy(rng.integers(100, 40_000, 32))
        ids = torch.cat([torch.tensor([model.tokenizer.bos_token_id]), words, words])[None]
        rows = ids.expand(len(sets), -1)
        with model.edit(zeroed(sets)):
            logits = forward(model, rows, torch.ones_like(rows), keep=33).logits[:, -33:-1]
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), rows[:, 33:].flatten(), reduction="none"
        )
        losses.append(loss.view(len(sets), -1).mean(1).numpy())
    return np.stack(losses, 1)


def measure(n: int, seed: int, model: HookedModel | None = None, samples: int = 32) -> Any:
    model = model or interp.load("smol-llava", dtype="bfloat16")
    start = time.time()
    scores = scan(model, samples, seed)
    print(f"scan ({time.time() - start:.0f} s)", flush=True)
    sets = {name: top(scores, name) for name in SCORES}
    none = torch.zeros(1, model.n_layers, model.n_heads, dtype=torch.bool)
    whole = {
        "caption loss": caption_loss(model, none, n, seed)[0].mean(),
        "caption F1": caption_f1(model, none, 2 * n // 3, seed)[0],
        "repeat loss": repeat_loss(model, none, n, seed)[0].mean(),
    }
    found: dict[str, Any] = {}
    for name, heads in sets.items():
        start = time.time()
        masks = drawn(heads, model, seed)
        found[name] = dict(
            heads=[f"L{la}H{h}" for la, h in heads],
            values=[round(float(v), 4) for v in scores[name].nlargest(TOP)],
            losses={
                "caption loss": caption_loss(model, masks, n, seed).mean(1).tolist(),
                "caption F1": caption_f1(model, masks, 2 * n // 3, seed).tolist(),
                "repeat loss": repeat_loss(model, masks, n, seed).mean(1).tolist(),
            },
        )
        print(f"{name} ({time.time() - start:.0f} s)", flush=True)
    looked = looking(model, 4 * n, seed)
    overlaps = {a: {b: len(set(sets[a]) & set(sets[b])) for b in sets} for a in sets}
    total = model.n_layers * model.n_heads
    return dict(
        model=model.name, n=n, seed=seed, top=TOP, draws=DRAWS, heads=total,
        expected_overlap=TOP * TOP / total, untouched={k: float(v) for k, v in whole.items()},
        looking=looked, sets=found, overlaps=overlaps,
        **stamp(),
    )  # fmt: skip


def rank(values: list[float], worse: int) -> str:
    """The set's value, the random draws' range, and how many of them do at least as much harm;
    worse: 1 where more is worse, −1 where less is."""
    own, others = values[0], np.array(values[1:])
    more = int((worse * others >= worse * own).sum())
    return f"{own:.2f} ({others.min():.2f} … {others.max():.2f}; {more} of {len(others)})"


def render_table(result: dict[str, Any]) -> str:
    """Markdown: what is lost without each set, then the overlaps."""
    base = result["untouched"]
    lines = [
        "| top 16 by | heads that … | caption loss | caption F1 | loss of a repeated text |",
        "|---|---|---|---|---|",
        f"| none | | {base['caption loss']:.2f} | {base['caption F1']:.2f} | "
        f"{base['repeat loss']:.2f} |",
    ]
    for name, one in result["sets"].items():
        cells = [
            rank(one["losses"][m], w)
            for m, w in (("caption loss", 1), ("caption F1", -1), ("repeat loss", 1))
        ]
        lines.append(f"| `{name}` | {SCORES[name]} | " + " | ".join(cells) + " |")
    names = list(result["sets"])
    shared = ["| | " + " | ".join(f"`{n}`" for n in names) + " |", "|---|" + "---|" * len(names)]
    for a in names:
        row = [str(result["overlaps"][a][b]) if a != b else "" for b in names]
        shared.append(f"| `{a}` | " + " | ".join(row) + " |")
    gazes = ["| head | AUC of patches | AUC of cells | share of the image's weight |",
             "|---|---|---|---|"]  # fmt: skip
    for one in result["looking"]:
        cells = [interval(one[m], "{:.2f}".format) for m in ("patches", "cells", "share")]
        gazes.append(f"| {one['head']} | " + " | ".join(cells) + " |")
    about = (
        f"{result['n']} pictures (texts) a number, of F1 {2 * result['n'] // 3}; "
        f"{result['machine']}, {result['date']}, seed {result['seed']}; "
        "weights in bfloat16 ([all numbers](../examples/vision_heads.json))."
    )
    return "\n".join(
        [
            *gazes, "",
            "From the token before an object's word, over "
            f"{result['looking'][0]['cells']['n']} scenes; a thing lies on four patches, and of "
            "cells there are nine. Then what is lost:", "",
            *lines, "",
            f"In brackets: {result['draws']} random draws of as many heads of the same layers, "
            "from the least value to the most, and how many of them do as much harm.", "",
            f"Heads that two sets share, of 16 (chance: {result['expected_overlap']:.1f}):", "",
            *shared, "", about,
        ]
    )  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, "vision_heads", 48).parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.n, arguments.seed)
    publish(result, render_table(result), arguments, BEGIN, END)


if __name__ == "__main__":
    main()
