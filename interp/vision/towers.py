"""Which of a model's towers reads pictures: the vision tower beside a language model, or all of a
model that reads pictures alone (ViT, the vision half of CLIP, DINOv2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from interp.inputs.forward import forward
from interp.vision.prompts import takes_images
from interp_hooks.huggingface.images import sees_alone as module_sees_alone

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


def sees_alone(model: HookedModel) -> bool:
    """Whether a model reads pictures and no text.

    Args:
        model: the model.

    Example:
        >>> from interp.vision.towers import sees_alone
        >>> sees_alone(model), sees_alone(interp.load("llava"))
        (False, False)
    """
    return not takes_images(model) and module_sees_alone(model.module, model.accepts)


def picture_tower(model: HookedModel) -> str | None:
    """The name of the tower that reads pictures, None where no tower does: "vision" beside a
    language model, "" in a plain ViT.

    Args:
        model: the model.

    Example:
        >>> from interp.vision.towers import picture_tower
        >>> picture_tower(interp.load("llava"))
        'vision'
    """
    if takes_images(model):
        return "vision"
    if not sees_alone(model):
        return None
    named = [tower for tower in ("vision", "encoder") if tower in model.towers]
    return named[0] if named else model.main_tower


def see(model: HookedModel, inputs: Mapping[str, Any]) -> Any:
    """What a model returns on a picture: with a prompt, the logits of its last token alone."""
    more = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    if "input_ids" not in inputs:
        return model(**inputs)
    return forward(model, inputs["input_ids"], inputs.get("attention_mask"), keep=1, **more)
