"""RITUAL: what the model says of a randomly transformed image counts too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError
from interp.procedures.branch import Branch, TwoBranches, prompt_of
from interp.procedures.transforms import TRANSFORMS, transformed
from interp.vision.reading import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp_hooks.model import HookedModel


class RITUAL(TwoBranches):
    """Complementary decoding with a transformed image (RITUAL), a logits processor.

    (Woo et al. 2024, arXiv 2405.17821.)

        ``model.generate(**inputs, logits_processor=[RITUAL(model, inputs)])``

    The second prediction has, for each image, one that a transformation drawn at random has
    changed: a horizontal or vertical flip, a rotation, colour jitter, Gaussian blur, or a crop.
    With l the model's scores and l_T that prediction's,

        l' = l + κ l_T  where l ≥ max l + ln β        −∞ elsewhere.

    Greedy, sampled and beam search; batches, left-padded. κ = 3, β = 0.1, the six transformations
    and their ranges are the released code's; the paper's own text was not at hand, so whether it
    has the cutoff β is not verified. Pictures are transformed by PIL, not torchvision: the same
    operations, other random numbers. `RITUALPlus` lets the model choose the transformation. κ = 0
    and β = 0 leave the scores as they are.

    Args:
        model: a vision-language model.
        inputs: those of `generate`, input_ids and pixel_values among them.
        images: the pictures (or paths), in the order of the prompts; None: read back from
            pixel_values, at the size that the vision tower sees (LLaVA-1.5; pictures cut into tiles
            must be given).
        kappa: κ; 0 leaves out the second prediction.
        beta: β; 0 keeps all tokens.
        transforms: of which one is drawn for each image.
        seed: of the draws.

    Misleads:
        A flipped or cropped picture is wrong about left, right and counts, and what is asked of
        them is asked of it too. On smol-llava object F1 falls by .06.

    Raises:
        InputError: a text-only model, no processor, a prompt without image, right padding, an
            unknown transformation, numbers out of range, pictures that don't fit the prompt; in
            use, another prompt than the processor's.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> ritual = interp.procedures.RITUAL(model, inputs)
        >>> out = model.generate(**inputs, logits_processor=[ritual], max_new_tokens=2)
        >>> out.shape[0]
        1
    """

    name = "RITUAL"

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        images: Sequence[Any] | None = None,
        kappa: float = 3.0,
        beta: float = 0.1,
        transforms: Sequence[str] = TRANSFORMS,
        seed: int = 0,
    ):
        from interp.loading import load

        unknown = [t for t in transforms if t not in TRANSFORMS]
        if unknown or not transforms:
            raise InputError(
                f"RITUAL's transformations are {', '.join(TRANSFORMS)}, not {unknown or 'none'}."
            )
        if kappa < 0:
            raise InputError(f"RITUAL needs κ from 0 up, not {kappa}.")
        hooked = load(model)
        super().__init__(hooked, beta)
        self.kappa = kappa
        ids, mask, more = prompt_of(hooked, inputs, self.name)
        if hooked.processor is None:
            raise InputError(
                f"{hooked.name} came without its processor; give it to interp.load as processor=."
            )
        originals = (
            pictures(hooked, more["pixel_values"])
            if images is None
            else [read_image(image) for image in images]
        )
        #: (transformation, picture) of each image
        self.complements: list[tuple[str, Image]] = []
        chosen = self.chosen(hooked, inputs, originals, transforms)
        for i, picture in enumerate(originals):
            rng = np.random.default_rng([seed, i])
            kind = transforms[int(rng.integers(len(transforms)))]
            kind = chosen[i] if chosen else kind  # after the draw: a kind's numbers are the same
            self.complements.append((kind, transformed(picture, kind, rng)))
        if kappa:
            tensors = _processed(hooked, more, [picture for _, picture in self.complements])
            self.branch = Branch(hooked, ids, mask, {**more, **tensors})

    def chosen(
        self,
        model: HookedModel,
        inputs: Mapping[str, Any],
        images: Sequence[Image],
        transforms: Sequence[str],
    ) -> list[str]:
        """The transformation of each image; none where they are drawn."""
        return []

    def join(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return own + self.kappa * other


def pictures(model: HookedModel, pixel_values: Any) -> list[Image]:
    """The pictures behind pixel_values (images, 3, height, width), rounded to 8 bits."""
    from PIL import Image

    reader = model.processor.image_processor
    if (
        not isinstance(pixel_values, torch.Tensor)
        or pixel_values.ndim != 4
        or pixel_values.shape[1] != 3
    ):
        raise InputError(
            f"The pictures of {model.name} can't be read back from its inputs; give them as "
            "images=."
        )
    mean, std = (
        torch.tensor(getattr(reader, name))[:, None, None] for name in ("image_mean", "image_std")
    )
    whole = (pixel_values.float().cpu() * std + mean).clamp(0, 1)
    pixels = (whole * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def _processed(
    model: HookedModel, inputs: Mapping[str, Any], made: list[Image]
) -> dict[str, torch.Tensor]:
    """What the processor makes of pictures, in place of what it made of the prompt's. Raises
    `InputError`."""
    tensors = dict(model.processor.image_processor(images=made, return_tensors="pt"))
    tensors = {name: value for name, value in tensors.items() if name in inputs}
    if tensors["pixel_values"].shape != inputs["pixel_values"].shape:
        raise InputError(
            f"RITUAL needs the pictures of the prompt, in order: {len(made)} of them give "
            "pixel_values of shape "
            f"{tuple(tensors['pixel_values'].shape)}, and the prompt has "
            f"{tuple(inputs['pixel_values'].shape)}."
        )
    return {name: value.to(inputs[name]) for name, value in tensors.items()}
