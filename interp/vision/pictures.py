"""What image scores are measured on: rendered scenes with their captions, or a folder of the user's
pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp.vision.pixels import pixels
from interp.vision.prompts import with_images
from interp.vision.towers import sees_alone

if TYPE_CHECKING:
    import torch

    from interp_hooks.model import HookedModel

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def files_in(folder: str | Path) -> list[Path]:
    """The pictures in a folder, by name. Raises `InputError` where there is none."""
    place = Path(folder)
    if not place.is_dir():
        raise InputError(
            f"There is no folder of images {place}; give one that holds PNG or JPEG files."
        )
    files = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise InputError(f"The folder {place} holds no images; PNG and JPEG files are read.")
    return files


@dataclass(frozen=True)
class Pictures:
    """So many pictures and what is said of them: rendered scenes from a seed, or the first of a
    folder by name, with a prompt of one's own or the usual one."""

    samples: int
    seed: int = 0
    folder: str | None = None
    prompt: str | None = None

    def count(self) -> int:
        """How many there are: `samples`, or fewer where the folder has fewer."""
        return self.samples if self.folder is None else len(files_in(self.folder)[: self.samples])

    def pairs(self, told: bool) -> list[tuple[str, Any]]:
        """(prompt, picture) of each sample. Scenes are asked to be described, with the caption
        after it where `told`: then there are many words after the image. With a prompt of one's
        own, that prompt and nothing after it."""
        from interp.scenes import caption, render, usual
        from interp.scenes.words import DESCRIBE

        if self.folder is not None:
            files = files_in(self.folder)[: self.samples]
            return [(self.prompt or DESCRIBE, path) for path in files]
        pairs = []
        for i in range(self.samples):
            scene = usual(np.random.default_rng([self.seed, i]))
            text = self.prompt or (f"{DESCRIBE} {caption(scene)}" if told else DESCRIBE)
            pairs.append((text, render(scene)))
        return pairs

    def shown(self) -> tuple[str, Any]:
        """The first picture with a prompt whose last word looks for something in it: a scene's
        caption up to the first object, or the user's prompt."""
        from interp.scenes import caption, usual
        from interp.scenes.words import DESCRIBE

        prompt, picture = self.pairs(told=False)[0]
        if self.folder is None and self.prompt is None:
            scene = usual(np.random.default_rng([self.seed, 0]))
            prompt = f"{DESCRIBE} {' '.join(caption(scene).split()[:2])}"
        return prompt, picture

    def inputs(
        self, model: HookedModel, told: bool = False, limit: int | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Inputs of each sample, a batch of one each, without a prompt for a model that reads
        pictures alone; `limit`: the first so many. Raises `InputError`."""
        pairs = self.pairs(told)[:limit]
        if sees_alone(model):
            return [pixels(model, shown) for _, shown in pairs]
        return [with_images(model, text, [shown]) for text, shown in pairs]
