"""CHAIR: what captions tell that is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from interp import scenes
from interp.errors import InputError
from interp.scenes import COLORS, OBJECTS, PARTNER, Scene, Thing
from interp.scenes.damage import check
from interp.scenes.words import DESCRIBE
from interp.support.json_text import parse
from interp.tasks.images import ImageTask, Picture
from interp.tasks.pope import WORLDS

COCO_PROMPT = "Please describe this image in detail."
#: how a caption may have been begun
BEGUN = ("", "true", "false")


@dataclass(frozen=True)
class Chair(ImageTask):
    """Captions judged by the objects they name (Rohrbach et al., EMNLP 2018, arXiv 1809.02156):

        CHAIR_I = named objects that are not there / named objects
        CHAIR_S = captions that name such an object / captions

    On rendered scenes, or on COCO's pictures and annotations (`from_coco`). An object counts once a
    caption.

    Args:
        world: "usual" scenes, or "broken" ones, in which companions are missing.
        damage: what the pictures lost, "noise", "blur", "contrast" or "faint"; None for nothing.
        level: 1 to 3, how much of it.
        begun: what the model goes on from, which counts for nothing: "" nothing; "true", all that
            is there, and "and", so that whatever new is named is made up; "false", a thing that is
            not there, a missing companion where there is one (as in Zhang et al. 2023, arXiv
            2305.13534, on errors that snowball).
        words: what a caption may say → the object; None for the rendered world's own words.
        records: problems of COCO.

    Misleads:
        A caption that names less makes up less: read object F1 beside it. Under PAINT smol-llava's
        CHAIR_I falls by .07 and its F1 by .18.
    """

    world: str = "broken"
    damage: str | None = None
    level: int = 2
    begun: str = ""
    words: Mapping[str, str] | None = None
    records: tuple[Picture, ...] | None = None

    name = "chair"
    summary = "objects that captions make up (needs a vision-language model)"
    citation = "Rohrbach et al. 2018, arXiv 1809.02156; scenes rendered"
    judge = "mass"
    max_new_tokens = 64
    metrics: ClassVar = {
        "CHAIR_I": (("made_up",), ("named",)),
        "CHAIR_S": (("any_made_up",), ("one",)),
        "object F1": (("hit", "hit"), ("named", "real")),
        "object recall": (("hit",), ("real",)),
        "words": (("words",), ("one",)),
    }

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise InputError(f"The scenes of chair are usual or broken, not {self.world!r}.")
        if self.begun not in BEGUN:
            raise InputError(
                f"A caption of chair is begun with nothing, true or false, not {self.begun!r}."
            )
        check(self.damage, self.level)

    @classmethod
    def from_coco(
        cls, instances: str | Path, images: str | Path, synonyms: str | Path | None = None
    ) -> Chair:
        """Pictures of the folder `images` that COCO's `instances` (instances_val2014.json)
        annotates. `synonyms`: a line an object, its words separated by commas, the object's name
        first (CHAIR's synonyms.txt); without it the 80 names and their plain plurals. Raises
        `InputError`."""
        try:
            content = parse(Path(instances).read_text(encoding="utf-8"))
            names = {c["id"]: str(c["name"]) for c in content["categories"]}
            files = {i["id"]: str(i["file_name"]) for i in content["images"]}
            there: dict[int, set[str]] = {}
            for entry in content["annotations"]:
                there.setdefault(entry["image_id"], set()).add(names[entry["category_id"]])
        except OSError as error:
            raise InputError(
                f"The annotations {instances} can't be read: {error.strerror}."
            ) from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{instances} is not a file of COCO's instances: {error}.") from error
        words = {n: name for name in names.values() for n in (name, f"{name}s")}
        if synonyms is not None:
            try:
                lines = Path(synonyms).read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise InputError(
                    f"The synonyms {synonyms} can't be read: {error.strerror}."
                ) from error
            for line in lines:
                same = [word.strip().lower() for word in line.split(",") if word.strip()]
                words |= {n: same[0] for word in same for n in (word, f"{word}s")}
        records = [
            Picture(
                Path(images) / files[number], COCO_PROMPT, k, dict(names=frozenset(there[number]))
            )
            for k, number in enumerate(sorted(there))
            if (Path(images) / files[number]).is_file()
        ]
        if not records:
            raise InputError(f"None of the pictures that {instances} annotates is in {images}.")
        return cls(words=words, records=tuple(records))

    def problems(self, n: int, seed: int = 0) -> list[Picture]:
        if self.records is not None:
            return list(self.records[:n])
        pictures = []
        for number in range(n):
            rng = np.random.default_rng([seed, number])
            scene = WORLDS[self.world](rng)
            shown = scenes.damaged(scene, self.damage, self.level, number)
            prompt = f"{DESCRIBE} {beginning(scene, self.begun, rng)}".rstrip()
            pictures.append(Picture(shown, prompt, number, dict(names=scene.names, scene=scene)))
        return pictures

    def named(self, caption: str) -> set[str]:
        """The objects that a caption names; the longest wording wins ("hot dog" is no dog)."""
        words = dict(zip(OBJECTS, OBJECTS, strict=True)) if self.words is None else self.words
        longest = "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))
        return {words[w] for w in re.findall(rf"\b({longest})\b", caption.lower())}

    def count(self, answer: str, problem: Picture) -> dict[str, float]:
        named, real = self.named(answer), problem.info["names"]
        made_up = len(named - real)
        return dict(
            one=1.0,
            made_up=float(made_up),
            any_made_up=float(made_up > 0),
            named=float(len(named)),
            real=float(len(real)),
            hit=float(len(named & real)),
            words=float(len(re.findall(r"\w+", answer))),
        )


def beginning(scene: Scene, begun: str, rng: np.random.Generator) -> str:
    """The words that a caption of the scene begins with: none, all that is there, or one thing that
    is not."""
    if begun == "true":
        return scenes.caption(scene).removesuffix(" .") + " and"
    if begun != "false":
        return ""
    absent = [name for name in OBJECTS if name not in scene.names]
    missing = [PARTNER[n] for n in sorted(scene.names) if PARTNER.get(n) in absent]
    name = str(rng.choice(missing or absent))
    taken = {t.cell for t in scene.things}
    row, column = divmod(int(rng.choice([c for c in range(9) if c not in taken])), 3)
    thing = Thing(name, str(rng.choice(list(COLORS))), row, column)
    return scenes.caption(Scene((thing,), 0)).removesuffix(" .") + " and"
