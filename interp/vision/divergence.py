"""What heads owe to the image: vision-aware head divergence, of a prompt and of every generated
token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.inputs.forward import forward
from interp.inputs.tokenizer import stop_tokens
from interp.vision.prompts import (
    checked,
    needs_images,
    reads_text_alone,
    to_take_out,
    without_images,
)
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class TVHD:
    """A greedy answer and its text-visual head divergence, token by token.

    Attributes:
        tokens: (batch, new) int, what was generated, greedily.
        curve: (batch, new), T-VHD of each, NaN after the end of a sample's answer.
        k: heads of each layer that were summed.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> found = interp.vision.t_vhd(model, inputs, max_new_tokens=2)
        >>> found.tokens.shape == found.curve.shape, found.k
        (True, 4)
    """

    tokens: torch.Tensor
    curve: torch.Tensor
    k: int


def vhd(
    model: HookedModel, inputs: Mapping[str, Any], without: str | None = None
) -> dict[int, torch.Tensor]:
    """Vision-aware head divergence of every head: how far its output moves without the image.

    VHD_{l,h} = ‖a(with image) − a(image tokens removed)‖₂, a the head's output before W_O at the
    last position. He et al. 2025 (ACL), arXiv 2412.13949: both runs read the same words, so only
    the last position stands at the same word in both.

    Args:
        model: a vision-language model.
        inputs: prompts with images or videos, left-padded, as `interp.vision.with_images` makes
            them.
        without: what is taken out, "images", "videos" or "all"; must be said where a prompt holds
            both kinds.

    Returns:
        layer → (batch, heads) float32, of the main tower.

    Raises:
        InputError: a model that takes no images, or a prompt without; right padding.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> interp.vision.vhd(model, inputs)[2].shape
        torch.Size([1, 8])
    """
    return next(_steps(model, inputs, 1, without))[1]


def t_vhd(
    model: HookedModel,
    inputs: Mapping[str, Any],
    max_new_tokens: int = 32,
    k: int | None = None,
    without: str | None = None,
) -> TVHD:
    """T-VHD of each generated token: near 0 where the model would write it without the image.

    T-VHD_t = Σ_l Σ_{h∈top k of layer l} VHD_{l,h} at the position that makes the t-th generated
    token. The answer is the one with the image; the run without it reads the same words.

    Args:
        model: a vision-language model.
        inputs: as of `vhd`.
        max_new_tokens: the greedy answer's length; it ends earlier where all samples have ended.
        k: heads a layer. Not published; half of a layer's heads unless given.
        without: as of `vhd`.

    Returns:
        A `TVHD`: the answer and the curve.

    Raises:
        InputError: a model that takes no images, a prompt without; max_new_tokens below 1, a k that
            no layer has.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> bool((interp.vision.t_vhd(model, inputs, max_new_tokens=2).curve >= 0).all())
        True
    """
    needs_images(model, "T-VHD")
    k = max(1, model.n_heads // 2) if k is None else k
    if not 1 <= k <= model.n_heads or max_new_tokens < 1:
        raise InputError(
            f"T-VHD sums the top 1 to {model.n_heads} heads of each layer, for 1 or more tokens; k "
            f"is {k} and "
            f"max_new_tokens {max_new_tokens}."
        )
    tokens: list[torch.Tensor] = []
    curve: list[torch.Tensor] = []
    ends = torch.tensor(sorted(stop_tokens(model)), dtype=torch.long)
    for token, by_layer in _steps(model, inputs, max_new_tokens, without):
        total = torch.stack(
            [v.topk(min(k, v.shape[1]), -1).values.sum(-1) for v in by_layer.values()]
        ).sum(0)
        over = (
            torch.isin(torch.stack(tokens, 1), ends).any(1)
            if tokens
            else torch.zeros(len(token), dtype=torch.bool)
        )
        tokens.append(token)
        curve.append(torch.where(over, torch.nan, total))
        if bool((over | torch.isin(token, ends)).all()):
            break
    return TVHD(torch.stack(tokens, 1), torch.stack(curve, 1), k)


def _steps(
    model: HookedModel, inputs: Mapping[str, Any], steps: int, without: str | None
) -> Iterator[tuple[torch.Tensor, dict[int, torch.Tensor]]]:
    """Greedy decoding with the image: (token (batch,), layer → VHD (batch, heads)) of each step."""
    checked(model, inputs, "VHD")
    reads_text_alone(model, "VHD")
    bare = without_images(model, inputs, to_take_out(model, inputs, without))
    if not bool(bare["attention_mask"].any(1).all()):
        raise InputError(
            "VHD compares with the prompt without its image, and this one holds nothing else."
        )
    reader, blind = _Reader(model, dict(inputs)), _Reader(model, bare)
    for _ in range(steps):
        a, logits = reader.read()
        b = blind.read()[0]
        token = logits.argmax(-1).cpu()
        yield token, {n: (a[n] - b[n]).norm(dim=-1).cpu() for n in a}
        reader.add(token)
        blind.add(token)


class _Reader:
    """A prompt that is read, then added to token by token; `read` gives z at the last position, and
    the logits."""

    def __init__(self, model: HookedModel, inputs: dict[str, Any]) -> None:
        self.model = model
        self.ids = inputs.pop("input_ids")
        mask = inputs.pop("attention_mask", None)
        self.mask = torch.ones_like(self.ids) if mask is None else mask
        self.more, self.cache = inputs, None

    def add(self, token: torch.Tensor) -> None:
        new = token.to(self.ids)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        if self.cache is None:
            self.ids = torch.cat([self.ids, new], 1)
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in self.more:
                    kinds = self.more[name]
                    self.more[name] = torch.cat([kinds, torch.zeros_like(new).to(kinds)], 1)
        else:
            self.ids, self.more = new, {}

    @torch.no_grad()
    def read(self) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """(layer → z (batch, heads, d) float32, logits (batch, vocabulary)); left padding: the last
        slot is a word."""
        z: dict[int, torch.Tensor] = {}

        def note(stats: LayerStats) -> None:
            if stats.site.is_main:
                assert stats.z is not None
                z[stats.site.layer] = stats.z[:, -1].float()

        cached: dict[str, Any] = {}
        if self.model.has_cache:
            cached = (
                dict(use_cache=True)
                if self.cache is None
                else dict(use_cache=True, past_key_values=self.cache)
            )
        with self.model.watch(Question(z=True), note):
            out = forward(self.model, self.ids, self.mask, keep=1, **cached, **self.more)
        self.cache = out.past_key_values if cached else None
        return z, out.logits[:, -1]
