"""RITUAL+: the model itself says which transformation of its image counts too."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.inputs.tokenizer import Text
from interp.procedures.branch import Branch, prompt_of
from interp.procedures.ritual import RITUAL
from interp.procedures.transforms import TRANSFORMS
from interp.vision.prompts import spans, with_images, without_images

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp_hooks.model import HookedModel

ASK = (
    "The question is: {question}\nWhich change of this image would help most to answer it: "
    "{names}? The answer is one of them."
)


class RITUALPlus(RITUAL):
    """RITUAL with the transformation that the model prefers for each image (RITUAL+).

    (Woo et al. 2024, arXiv 2405.17821, second version: transformations are chosen by the model's
    own feedback.)

        ``model.generate(**inputs, logits_processor=[RITUALPlus(model, inputs)])``

    For each image the model is asked, in a prompt of its own with the untouched image and the
    question, which transformation would help; its name T = t_1 … t_n scores

        1/n Σ_i ln p(t_i | image, question, t_1 … t_{i−1})        the mean over its n tokens,

    and the best one is taken, the first of equal ones. The rest is `RITUAL`, whose random numbers
    (an angle, a part of the picture) a transformation keeps. Neither code nor wording of RITUAL+
    were at hand: `ASK` and the score are this project's.

    Args:
        model, inputs, images, kappa, beta, transforms, seed: as in `RITUAL`.
        questions: what each prompt asks; None: the words of the prompt, its roles among them.

    Misleads:
        A small model answers by the sound of a name rather than by the picture: look at
        `complements` and `preferences`, (images, transformations). smol-llava names colour jitter
        for 77 of 100 pictures, and does no better than with a drawn transformation.

    Raises:
        InputError: as `RITUAL`; another number of questions than prompts.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> ritual = interp.procedures.RITUALPlus(model, inputs)
        >>> ritual.preferences.shape
        torch.Size([1, 6])
    """

    name = "RITUALPlus"

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        images: Sequence[Any] | None = None,
        kappa: float = 3.0,
        beta: float = 0.1,
        transforms: Sequence[str] = TRANSFORMS,
        seed: int = 0,
        questions: Sequence[str] | None = None,
    ):
        self.questions = questions
        #: (images, transformations): mean log-probability of each name
        self.preferences = torch.zeros(0, len(transforms))
        super().__init__(model, inputs, images, kappa, beta, transforms, seed)

    def chosen(
        self,
        model: HookedModel,
        inputs: Mapping[str, Any],
        images: Sequence[Image],
        transforms: Sequence[str],
    ) -> list[str]:
        rows = [row for row, of_row in enumerate(spans(model, inputs)) for _ in of_row]
        if len(rows) != len(images):
            raise InputError(
                f"The prompt has {len(rows)} images, and {len(images)} pictures were given."
            )
        questions = self.questions
        if questions is None:
            words = without_images(model, inputs)
            questions = [
                model.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).strip()
                for ids, mask in zip(words["input_ids"], words["attention_mask"], strict=True)
            ]
        if len(questions) != len(inputs["input_ids"]):
            raise InputError(
                f"There are {len(inputs['input_ids'])} prompts and {len(questions)} questions."
            )
        names = [kind.replace("_", " ") for kind in transforms]
        listed = ", ".join(names)
        texts = [ASK.format(question=questions[row], names=listed) for row in rows]
        asked = with_images(model, texts, [[image] for image in images])
        self.preferences = name_scores(model, asked, names)
        return [transforms[i] for i in self.preferences.argmax(1).tolist()]


@torch.no_grad()
def name_scores(
    model: HookedModel, inputs: Mapping[str, Any], names: Sequence[str]
) -> torch.Tensor:
    """(prompts, names) float32: mean log-probability of each name's tokens after each prompt."""
    ids, mask, more = prompt_of(model, inputs, "RITUALPlus")
    text = Text(model.tokenizer)
    # after a chat's line break a name begins by itself, after words with a space
    before = model.tokenizer.decode(ids[0, -1:])
    gap = "" if not before or before[-1].isspace() else " "
    asked = Branch(model, ids, mask, more)
    first = asked(ids).float().log_softmax(-1)  # (prompts, vocabulary)
    scores = []
    for name in names:
        tokens = text.encode(gap + name)
        read, here, total = asked.fork(), ids, first[:, tokens[0]]
        for past, token in itertools.pairwise(tokens):
            here = torch.nn.functional.pad(here, (0, 1), value=past)
            total = total + read(here).float().log_softmax(-1)[:, token]
        scores.append(total / len(tokens))
    return torch.stack(scores, 1).cpu()
