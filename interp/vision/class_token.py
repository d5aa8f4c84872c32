"""Which patches of an image its class token looks at, and PAINT's edits of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.vision.prompts import checked, spans
from interp_hooks.edit import LiveEdit
from interp_hooks.huggingface.images import grid_of_patches

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall
    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class Patches:
    """Patches of the images of a prompt, and where they stand in it.

    attention: layer → (images, patches) float32, attention of the class token; rows: (images,) the
    sample of each image; slots: (images, patches) where its patches stand in the padded sequence.
    """

    attention: dict[int, torch.Tensor]
    rows: torch.Tensor
    slots: torch.Tensor

    def keys(self, chosen: torch.Tensor, batch: int, width: int) -> torch.Tensor:
        """(batch, width) bool: the slots of chosen patches (images, patches) bool."""
        mask = torch.zeros(batch, width, dtype=torch.bool)
        rows = self.rows[:, None].expand_as(self.slots)
        mask[rows[chosen], self.slots[chosen]] = True
        return mask


@torch.no_grad()
def cls_attention(
    model: HookedModel,
    inputs: Mapping[str, Any],
    layers: tuple[int, ...],
    scale: str = "heads",
    what: str = "This",
) -> Patches:
    """Attention of the vision tower's class token to the patches, in some layers.

    The weights of the class token itself are left out.

    Args:
        model: a vision-language model.
        inputs: prompts with images.
        layers: of the vision tower, negative ones from the end.
        scale: "heads": A_h = softmax(q_h·k_h/√d_head), summed over heads; "width":
            softmax(q·k/√d_model) with q and k of all heads together, as DAMRO's code has it.
        what: what asks for it, for error messages.

    Returns:
        `Patches`: layer → (images, patches), and where the patches stand in the prompt.

    Raises:
        InputError: a text-only model, a prompt without image, a tower without class token, a model
            whose image tokens are not one a patch (tiles, merged or resampled patches), a layer
            that the tower has not.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> interp.vision.cls_attention(model, inputs, (-2,)).attention.keys()
        dict_keys([-2])
    """
    checked(model, inputs, what)
    n = 1 + max((s.layer for s in model.sites if s.tower == "vision"), default=-1)
    numbers = {layer: layer % n for layer in layers if n and -n <= layer < n}
    if len(numbers) < len(set(layers)):
        raise InputError(
            f"The vision tower of {model.name} has {n} layers; there is none of number "
            f"{max(layers)}."
        )
    pictures = inputs.get("pixel_values")
    where = [
        (row, span) for row, row_spans in enumerate(spans(model, inputs)) for span in row_spans
    ]
    reader = _ClassToken(frozenset(numbers.values()), scale)
    sizes = {span.stop - span.start for _, span in where}
    if (
        not isinstance(pictures, torch.Tensor)
        or pictures.ndim != 4
        or len(pictures) != len(where)
        or len(sizes) > 1
    ):
        raise InputError(_refusal(model, what))
    with model.clean(), model.edit(reader):
        model.module.get_image_features(pixel_values=pictures.to(model.device))
    attention = {layer: reader.found[number].cpu() for layer, number in numbers.items()}
    rows, columns = grid_of_patches(model.module.config.vision_config) or (0, 0)
    size, patches = sizes.pop(), rows * columns
    shapes = {tuple(a.shape) for a in attention.values()}
    if shapes != {(len(where), patches)} or size not in (patches, patches + 1):
        raise InputError(_refusal(model, what))
    first = torch.tensor(
        [span.start + (size - patches) for _, span in where]
    )  # after the class token, if it is there
    return Patches(
        attention, torch.tensor([row for row, _ in where]), first[:, None] + torch.arange(patches)
    )


def _refusal(model: HookedModel, what: str) -> str:
    return (
        f"{what} needs a vision tower with a class token and one token a patch in the prompt, as "
        "in LLaVA-1.5, which "
        f"{model.name} has not."
    )


class _ClassToken(LiveEdit):
    """Changes nothing: notes the class token's attention to the others, (images, tokens − 1)."""

    def __init__(self, layers: frozenset[int], scale: str):
        self.layers, self.scale = layers, scale
        self.found: dict[int, torch.Tensor] = {}

    def touches(self, call: AttentionCall) -> bool:
        return call.site.tower == "vision" and call.site.layer in self.layers

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        assert call.query is not None and call.key is not None
        logits = torch.einsum("bhd,bhkd->bhk", call.query[:, :, 0].float(), call.key.float())
        if self.scale == "width":
            _, heads, _, d = call.query.shape
            a = torch.softmax(logits.sum(1) * (heads * d) ** -0.5, -1)
        else:
            a = torch.softmax(logits * call.scaling, -1).sum(1)
        self.found[call.site.layer] = a[:, 1:]
        return z
