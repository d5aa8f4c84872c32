"""POPE: is there a … in the image?"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from interp import scenes
from interp.errors import InputError
from interp.scenes import OBJECTS, PARTNER, Scene
from interp.scenes.damage import check
from interp.support.json_text import parse
from interp.tasks.images import ImageTask, Picture

SPLITS = ("random", "popular", "adversarial")
WORLDS = {"usual": scenes.usual, "broken": scenes.broken}


@dataclass(frozen=True)
class Pope(ImageTask):
    """Yes-or-no questions of presence (Li et al., EMNLP 2023, arXiv 2305.10355), as many of yes as
    of no. Absent objects are drawn at random; or are the most frequent ones (popular); or those
    that usually come with what is there (adversarial). On rendered scenes, or the published files
    (`from_file`).

    Args:
        split: random, popular, adversarial, or "all", a third of the scenes each.
        world: "usual" scenes, or "broken" ones, in which companions are missing.
        damage: what the pictures lost, "noise", "blur", "contrast" or "faint"; None for nothing.
        level: 1 to 3, how much of it.
        leading: the question supposes what it asks for: "this is a picture of a chair . is there a
            chair ?"
        each: questions of yes a scene, at most; as many of no.
        records: problems of a file.

    Misleads:
        Yes and no are balanced, so always yes is half right: read the share of yes. Clear rendered
        scenes may leave nothing to find: smol-llava answers all of them.
    """

    split: str = "all"
    world: str = "broken"
    damage: str | None = None
    level: int = 2
    leading: bool = False
    each: int = 3
    records: tuple[Picture, ...] | None = None

    name = "pope"
    summary = "is there a … in the picture? (needs a vision-language model)"
    citation = "Li et al. 2023, arXiv 2305.10355; scenes rendered"
    judge = "choice"
    chance = 0.5
    max_new_tokens = 4
    metrics: ClassVar = {
        "accuracy": (("right",), ("one",)),
        "F1": (("hit", "hit"), ("yes", "truth")),
        "precision": (("hit",), ("yes",)),
        "recall": (("hit",), ("truth",)),
        "share of yes": (("yes",), ("one",)),
    }

    def __post_init__(self) -> None:
        if self.split not in (*SPLITS, "all"):
            raise InputError(
                f"The splits of pope are {', '.join(SPLITS)} and all, not {self.split!r}."
            )
        if self.world not in WORLDS:
            raise InputError(f"The scenes of pope are usual or broken, not {self.world!r}.")
        check(self.damage, self.level)

    @classmethod
    def from_file(cls, path: str | Path, images: str | Path) -> Pope:
        """The published questions, a JSON object a line with image, text and label; `images` is the
        folder of COCO's val2014 pictures. Raises `InputError`."""
        records = []
        try:
            lines = [
                line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()
            ]
        except OSError as error:
            raise InputError(f"The questions {path} can't be read: {error.strerror}.") from error
        groups: dict[str, int] = {}
        for number, line in enumerate(lines, 1):
            try:
                entry = parse(line)
                name, question, label = (
                    str(entry["image"]),
                    str(entry["text"]),
                    str(entry["label"]).lower(),
                )
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(
                    f"Line {number} of {path} is not a question of POPE: {error}."
                ) from error
            if label not in ("yes", "no"):
                raise InputError(
                    f"Line {number} of {path} has the label {label!r}; it is yes or no."
                )
            group = groups.setdefault(name, len(groups))
            records.append(
                Picture(
                    Path(images) / name, question, group, dict(label=label, split=Path(path).stem)
                )
            )
        if not records:
            raise InputError(f"The file {path} has no questions.")
        return cls(records=tuple(records))

    def problems(self, n: int, seed: int = 0) -> list[Picture]:
        if self.records is not None:
            return list(self.records[:n])
        pictures: list[Picture] = []
        number = 0
        while len(pictures) < n:
            rng = np.random.default_rng([seed, number])
            scene = WORLDS[self.world](rng)
            split = SPLITS[number % 3] if self.split == "all" else self.split
            picture = scenes.damaged(scene, self.damage, self.level, number)
            for name, label in self.questions(scene, split, rng):
                info = dict(label=label, object=name, split=split, names=scene.names, scene=scene)
                asked = scenes.question(name)
                if self.leading:
                    asked = f"this is a picture of a {name} . {asked}"
                pictures.append(Picture(picture, asked, number, info))
            number += 1
        return pictures[:n]

    def questions(
        self, scene: Scene, split: str, rng: np.random.Generator
    ) -> list[tuple[str, str]]:
        """(object, yes or no) about a scene, in pairs."""
        there = [str(name) for name in rng.permutation(sorted(scene.names))][: self.each]
        absent = [name for name in OBJECTS if name not in scene.names]  # the most frequent first
        companions = [
            PARTNER[name] for name in there if name in PARTNER and PARTNER[name] in absent
        ]
        order = {
            "random": [str(name) for name in rng.permutation(absent)],
            "popular": absent,
            "adversarial": companions + [name for name in absent if name not in companions],
        }[split]
        return [
            pair
            for yes, no in zip(there, order, strict=False)
            for pair in ((yes, "yes"), (no, "no"))
        ]

    def count(self, answer: str, problem: Picture) -> dict[str, float]:
        yes, truth = said_yes(answer), problem.info["label"] == "yes"
        return dict(
            one=1.0,
            right=float(yes == truth),
            yes=float(yes),
            truth=float(truth),
            hit=float(yes and truth),
        )


def said_yes(answer: str) -> bool:
    """POPE's reading: no where the first sentence has "no" or "not", yes otherwise."""
    words: list[Any] = re.findall(r"[a-z]+", answer.lower().partition(".")[0])
    return not ({"no", "not"} & set(words))
