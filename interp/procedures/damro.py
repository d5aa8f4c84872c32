"""DAMRO: away from what the vision tower's outlier patches alone would say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from interp.errors import InputError
from interp.procedures.branch import Branch, TwoBranches, prompt_of
from interp.support.presets import settings_of
from interp.vision.class_token import cls_attention
from interp_hooks.huggingface.images import image_mask


class DAMRO(TwoBranches):
    """Contrastive decoding against outlier patches (DAMRO), a logits processor.

    (Gong et al., EMNLP 2024, arXiv 2410.04514.)

        ``model.generate(**inputs, logits_processor=[DAMRO(model, inputs)])``

    The second prediction sees, of each image, only the k patches that the vision tower's class
    token attends to most. With l the model's scores and l_k that prediction's,

        l' = (1 + α) l − α l_k  where l ≥ max l + ln β        −∞ elsewhere.

    Greedy, sampled and beam search; batches, left-padded. With sampling, `generate` applies its
    temperature, top-k and top-p afterwards; the released code samples from l' itself. α = 0 and
    β = 0 leave the scores as they are.

    Args:
        model: a vision-language model.
        inputs: those of `generate`, input_ids and pixel_values among them.
        alpha, k: 2 and 10 for LLaVA-1.5. (InstructBLIP's k = 4 and α = 0.5 or 1.5 filter patches
            before its Q-Former, which is not implemented: such models are refused.)
        beta: 0.1; 0 keeps all tokens.
        layer: of the vision tower, the last as in the released code.
        outliers: (images, patches) bool, the patches that the second prediction sees in place of
            those that attention picks: for controls.
        preset: "paper" (None): attention head by head, summed; "code": one softmax of the product
            of queries and keys over the full width. The patches stay in reading order, at
            consecutive positions (the code orders them by attention).

    Misleads:
        It needs a tower whose class token looks at patches. On smol-llava its outlier patches did
        no better than random ones.

    Raises:
        InputError: a text-only model, a prompt without image, right padding, image tokens that are
            not one a patch, a tower without class token, numbers out of range; in use, another
            prompt than the processor's.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> damro = interp.procedures.DAMRO(model, inputs, k=4)
        >>> out = model.generate(**inputs, logits_processor=[damro], max_new_tokens=2)
        >>> out.shape[0]
        1
    """

    name = "DAMRO"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"over": "heads"},
        "code": {"over": "width"},
    }

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        alpha: float = 2.0,
        k: int = 10,
        beta: float = 0.1,
        layer: int = -1,
        preset: str | None = None,
        outliers: torch.Tensor | None = None,
    ):
        from interp.loading import load

        over = settings_of("procedure DAMRO", preset or "paper", self.presets)["over"]
        if alpha < 0 or k < 1:
            raise InputError(f"DAMRO needs α from 0 up and k from 1 up, not {alpha} and {k}.")
        hooked = load(model)
        super().__init__(hooked, beta)
        self.alpha = alpha
        ids, mask, more = prompt_of(hooked, inputs, self.name)
        patches = cls_attention(hooked, inputs, (layer,), over, self.name)
        attention = patches.attention[layer]  # (images, patches)
        if k > attention.shape[1]:
            raise InputError(
                f"DAMRO keeps k = {k} patches of an image, and there are {attention.shape[1]}."
            )
        best = torch.zeros_like(attention, dtype=torch.bool).scatter_(
            1, attention.topk(k, 1).indices, True
        )
        if outliers is not None:
            if outliers.shape != best.shape:
                raise InputError(
                    f"outliers of DAMRO are (images, patches), here {tuple(best.shape)}, not "
                    f"{tuple(outliers.shape)}."
                )
            best = outliers.bool()
        #: (batch, slots) bool: the patches that the second prediction sees
        self.outliers = patches.keys(best, *ids.shape).to(ids.device)
        image = image_mask(hooked.module.config, ids, more)
        assert image is not None
        if alpha:
            self.branch = Branch(hooked, ids, mask.bool() & (~image | self.outliers), more)

    def join(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (1 + self.alpha) * own - self.alpha * other
