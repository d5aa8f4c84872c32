"""Classifier-free guidance by the image: away from what the prompt without it would say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from interp.errors import InputError
from interp.procedures.branch import Branch, TwoBranches, prompt_of
from interp.vision.prompts import PER_TOKEN, reads_text_alone, without_images
from interp_hooks.huggingface.images import image_mask


class ImageGuidance(TwoBranches):
    """Classifier-free guidance between the prompt with and without its image, a logits processor.

    (PAI, whose code PAINT, Arif et al. 2025, arXiv 2501.12206, runs with: `--use-cfg`, γ = 2.)

        ``model.generate(**inputs, logits_processor=[ImageGuidance(model, inputs)])``

    The second prediction reads the same prompt with the tokens of images taken out, at the
    positions that a prompt without them has. With p the model's and p_0 that prediction's
    probabilities,

        ln p' = γ ln p − (γ − 1) ln p_0 + const  where p ≥ β max p        0 elsewhere.

    With PAINT, `paint_for`'s edits stand around `generate`: they act in the model's own prediction
    and not in the second one, as in the released code; there the prompt's last row is left
    unedited when guidance is on, here it is not. Greedy, sampled and beam search; batches,
    left-padded. γ = 1 and β = 0 leave the scores as they are.

    Args:
        model: a vision-language model that reads text alone, too.
        inputs: those of `generate`, input_ids and pixel_values among them.
        gamma: γ, at least 1; PAINT's captions have 2, PAI's code 1.1 elsewhere.
        beta: β; 0 keeps all tokens.

    Misleads:
        What the words alone make likely is pushed down also where it is in the picture. On a
        hundred noisy pictures of smol-llava no measure moved.

    Raises:
        InputError: a text-only model, one that must have an image, a prompt without image, right
            padding, numbers out of range; in use, another prompt than the processor's.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> guidance = interp.procedures.ImageGuidance(model, inputs)
        >>> out = model.generate(**inputs, logits_processor=[guidance], max_new_tokens=2)
        >>> out.shape[0]
        1
    """

    name = "ImageGuidance"

    def __init__(
        self, model: Any, inputs: Mapping[str, Any], gamma: float = 2.0, beta: float = 0.1
    ):
        from interp.loading import load

        if not gamma >= 1:
            raise InputError(f"ImageGuidance needs γ from 1 up, not {gamma}.")
        hooked = load(model)
        super().__init__(hooked, beta)
        self.gamma = gamma
        ids, mask, more = prompt_of(hooked, inputs, self.name)
        reads_text_alone(hooked, self.name)
        image = image_mask(hooked.module.config, ids, more)
        assert image is not None
        if gamma != 1:
            stays = without_images(hooked, inputs)
            kept = {name: value for name, value in stays.items() if name not in PER_TOKEN}
            # what is there for each token stands in the prompt's slots, without the image's
            kept |= {n: more[n].masked_fill(image, 0) for n in PER_TOKEN if n in more}
            # the image's slots are hidden, so what stands in them is nobody's; their own id would
            # have the model look for pictures
            blank = ids.masked_fill(image, 0)
            self.branch = Branch(hooked, ids, mask.bool() & ~image, kept, read=blank)

    def join(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.gamma * own - (self.gamma - 1) * other
