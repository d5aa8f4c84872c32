"""What image scores are measured on: rendered scenes with their captions, or a folder of the user's
pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp.vision.prompts import with_images

if TYPE_CHECKING:
    import torch

    from interp.probes.probe import Settings
    from interp_hooks.model import HookedModel

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def files_in(folder: str | Path) -> list[Path]:
    """The pictures in a folder, by name. Raises `InputError` where there is none."""
    place = Path(folder)
    if not place.is_dir():
        raise InputError(
            f"There is no folder of images {place}; give one that holds PNG or JPEG files."
        )
    found = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise InputError(f"The folder {place} holds no images; PNG and JPEG files are read.")
    return found


def count(settings: Settings) -> int:
    """How many pictures a scan looks at: `samples`, or fewer where the folder has fewer."""
    return (
        settings.samples
        if settings.images is None
        else min(settings.samples, len(files_in(settings.images)))
    )


def pairs(settings: Settings, told: bool) -> list[tuple[str, Any]]:
    """(prompt, picture) of each sample. Scenes are asked to be described, with the caption after it
    where `told`: then there are many words after the image. With `settings.prompt`, that prompt and
    nothing after it."""
    from interp.scenes import caption, render, usual
    from interp.scenes.words import DESCRIBE

    if settings.images is not None:
        return [
            (settings.prompt or DESCRIBE, path)
            for path in files_in(settings.images)[: settings.samples]
        ]
    found = []
    for i in range(settings.samples):
        scene = usual(np.random.default_rng([settings.seed, i]))
        text = settings.prompt or (f"{DESCRIBE} {caption(scene)}" if told else DESCRIBE)
        found.append((text, render(scene)))
    return found


def shown(settings: Settings) -> tuple[str, Any]:
    """The first picture with a prompt whose last word looks for something in it: a scene's caption
    up to the first object, or the user's prompt."""
    from interp.scenes import caption, usual
    from interp.scenes.words import DESCRIBE

    prompt, picture = pairs(settings, told=False)[0]
    if settings.images is None and settings.prompt is None:
        scene = usual(np.random.default_rng([settings.seed, 0]))
        prompt = f"{DESCRIBE} {' '.join(caption(scene).split()[:2])}"
    return prompt, picture


def prompts(
    model: HookedModel, settings: Settings, told: bool = False, limit: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Inputs of each sample, a batch of one each; `limit`: the first so many. Raises
    `InputError`."""
    return [with_images(model, text, [picture]) for text, picture in pairs(settings, told)[:limit]]
