"""VHR from a prompt: which heads the image moves, found layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from interp.edits.vhr import VHR, above_median
from interp.errors import EditError, InputError
from interp.inputs.forward import forward
from interp.vision.prompts import (
    PER_TOKEN,
    checked,
    own_positions,
    reads_text_alone,
    to_take_out,
    without_images,
)
from interp_hooks.edit import LiveEdit
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall
    from interp_hooks.model import HookedModel

#: model type → the paper's layers: single ones, and how many at the end; other families take
#: LLaVA's
PRESETS: dict[str, tuple[tuple[int, ...], int]] = {"llava": ((1,), 14), "instructblip": ((), 18)}


class HeadSelection(NamedTuple):
    """Each (batch, layers, heads), over all layers of the text tower and 0 (False) where it was not
    looked at.

    divergence: ‖a(with image) − a(image removed)‖₂; text_activation: ‖a(image removed)‖²; selected:
    bool.
    """

    divergence: torch.Tensor
    text_activation: torch.Tensor
    selected: torch.Tensor


def vhr_layers(model: HookedModel) -> tuple[int, ...]:
    """The layers that VHR's paper reinforces: in the LLaVA family layer 1 and the last 14, in
    InstructBLIP the last 18.

    Other families take LLaVA's; the first layer is left alone, so that models with fewer layers
    take all but it.
    """
    kind = str(getattr(model.module.config, "model_type", ""))
    single, last = next((p for name, p in PRESETS.items() if name in kind), PRESETS["llava"])
    n = model.n_layers
    there = {s.layer for s in model.sites if s.is_main}
    return tuple(sorted({*(s for s in single if s < n), *range(max(1, n - last), n)} & there))


@torch.no_grad()
def select_heads(
    model: HookedModel,
    inputs: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    alpha: float = 2.0,
    guard: bool = True,
    without: str | None = None,
) -> HeadSelection:
    """Which heads VHR reinforces for each sample of a prompt, in one forward of twice the batch:
    the prompts as they are, and with their image tokens taken out (not blanked).

    With a_{l,h} the output before W_O at the last position, VHD_{l,h} = ‖a(with image) − a(image
    removed)‖₂ and TA_{l,h} = ‖a(image removed)‖², layer l selects {h : VHD > its median}, where by
    the outlier `guard` a VHD counts as 0 if VHD > μ + σ and TA > μ + σ over the layer's heads. Its
    heads are reinforced (a ← α a, at the last position, in both forwards; of the second one the
    paper's text does not say) before the next layer is looked at.

    Args and errors as in `vhr_for`.
    """
    ids, mask = checked(model, inputs, "VHR")
    reads_text_alone(model, "VHR")
    numbers = vhr_layers(model) if layers is None else tuple(dict.fromkeys(layers))
    for layer in numbers:
        model.check(Head(layer, 0))
    if not numbers:
        raise InputError(
            f"VHR has no layer to select heads in: {model.name} has {model.n_layers} layer(s)."
        )
    bare = without_images(model, inputs, to_take_out(model, inputs, without))
    pad = ids.shape[1] - bare["input_ids"].shape[1]
    both: dict[str, Any] = {
        k: v for k, v in inputs.items() if k not in ("attention_mask", "position_ids")
    }
    for name, value in bare.items():
        full = mask if name == "attention_mask" else inputs[name]
        if name in PER_TOKEN:
            value = torch.nn.functional.pad(value, (pad, 0))
        both[name] = torch.cat([full, value.to(full)])
    if not bool(bare["attention_mask"].any(1).all()):
        raise InputError(
            "VHR compares with the prompt without its image, and this one holds nothing else."
        )
    selector = _Selector(numbers, alpha, guard)
    with model.clean(), model.edit(selector):
        forward(
            model,
            both.pop("input_ids"),
            both.pop("attention_mask"),
            keep=1,
            **both,
            **own_positions(model),
        )
    shape = (len(ids), model.n_layers, model.n_heads)
    selection = HeadSelection(
        torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    )
    for layer, parts in selector.found.items():
        for all_layers, part in zip(selection, parts, strict=True):
            all_layers[:, layer, : part.shape[-1]] = part.cpu()
    return selection


def vhr_for(
    model: Any,
    inputs: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    alpha: float = 2.0,
    guard: bool = True,
    scope: Any = "decode",
    without: str | None = None,
) -> VHR:
    """The VHR edit of a prompt with an image, with the heads that the prompt selects.

    Ready for ``with model.edit(vhr): model.generate(**inputs)``; a batch has a set for each sample.

    Args:
        model: a vision-language model, or what `interp.load` takes.
        inputs: as `interp.vision.with_images` or the model's processor makes them, left-padded.
        layers: where heads are selected; None for the paper's (`vhr_layers`).
        alpha: what they are multiplied by.
        guard: the outlier guard; off for the ablation.
        scope: as in `VHR`.
        without: what is taken out, "images", "videos" or "all"; must be said where a prompt holds
            both kinds.

    Returns:
        the edit, with the heads that `select_heads` finds.

    Raises:
        InputError: a text-only model, a prompt without image or with nothing else, right padding.
        HeadError: a layer that the model has not.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["Is there a red circle?"], [picture])
        >>> len(interp.edits.vhr_for(model, inputs, layers=[2, 3]).heads) > 0
        True
    """
    from interp.loading import load

    hooked = load(model)
    masks = select_heads(hooked, inputs, layers, alpha, guard, without).selected
    if len(masks) > 1:
        return VHR(alpha=alpha, scope=scope, selected=masks)
    return VHR(
        tuple(Head(layer, head) for layer, head in masks[0].nonzero().tolist()), alpha, scope
    )


class _Selector(LiveEdit):
    """Selects heads on its way through the layers; the second half of the batch has no image."""

    def __init__(self, layers: tuple[int, ...], alpha: float, guard: bool):
        self.layers, self.alpha, self.guard = layers, alpha, guard
        self.found: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def touches(self, call: AttentionCall) -> bool:
        return call.site.is_main and call.site.layer in self.layers

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        if len(z) % 2:
            raise EditError(
                f"VHR selects heads from pairs of samples, and layer {call.site.layer} has "
                f"{len(z)}."
            )
        image, text = z[:, -1].float().chunk(2)  # (batch, heads, d) each
        vhd, activation = (image - text).norm(dim=-1), text.square().sum(-1)
        mask = above_median(vhd, activation, self.guard)
        self.found[call.site.layer] = vhd, activation, mask
        gains = torch.where(mask, self.alpha, 1.0).repeat(2, 1).to(z.dtype)  # (2 batch, heads)
        return torch.cat([z[:, :-1], (z[:, -1] * gains[..., None])[:, None]], 1)
