"""Route gating: where a head's image and its text pull a token apart, the text is turned down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.procedures.branch import Branch, TwoBranches, prompt_of
from interp_hooks.edit import LiveEdit
from interp_hooks.errors import TapError
from interp_hooks.heads import Head
from interp_kernels import attention

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall


class RouteGating(TwoBranches):
    """Gates each head's text route where it overrules a weak image route, a logits processor.

    (After the idea of causal route gating, arXiv 2605.24024; its code was not at hand, and the rule
    below is ours.)

        ``model.generate(**inputs, logits_processor=[RouteGating(model, inputs)])``

    At each step the model's own best token y is put to the test. In the row that predicts it, each
    head's output before W_O is the sum of two routes, z = z_vis + z_text, z_vis = Σ_{k∈image} A_k
    v_k; e = z·(W_O,h u_y), u_y the column of the unembedding, is what each does for y (the final
    norm left out). Where the two conflict and vision is the weaker, e_vis·e_text < 0 and |e_vis| <
    |e_text|,

        z ← z_vis + λ z_text,

    head by head, layer after layer; a second prediction, with a cache of its own, is made of it and
    replaces the model's. λ = 1 leaves the scores as they are.

    Args:
        model: a vision-language model whose W_O and unembedding can be read.
        inputs: those of `generate`, input_ids and pixel_values among them.
        scale: λ.
        heads: None for all.

    Misleads:
        The rule is ours after another's idea, so it says nothing of theirs. On smol-llava it harms:
        object F1 falls by .11.

    Raises:
        InputError: a text-only model, a prompt without image, right padding, λ outside [0, 1],
            weights that can't be read; in use, another prompt than the processor's, beams.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> gating = interp.procedures.RouteGating(model, inputs)
        >>> out = model.generate(**inputs, logits_processor=[gating], max_new_tokens=2)
        >>> out.shape[0]
        1
    """

    name = "route gating"

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        scale: float = 0.5,
        heads: Any = None,
    ):
        from interp.loading import load
        from interp_hooks.heads import parse_heads

        if not 0 <= scale <= 1:
            raise InputError(f"λ of route gating is between 0 and 1, not {scale}.")
        hooked = load(model)
        super().__init__(hooked, 0.0)
        chosen = None if heads is None else {hooked.check(h) for h in parse_heads(heads)}
        ids, mask, more = prompt_of(hooked, inputs, self.name)
        self.gate = Gate(hooked, scale, chosen)
        if scale < 1:
            self.branch = Branch(hooked, ids, mask, more, (self.gate,))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.branch is not None and len(input_ids) != len(self.branch.prompt):
            raise InputError("Route gating follows one text a prompt: no beams, no samples of one.")
        self.gate.toward(scores.argmax(-1))
        return super().__call__(input_ids, scores)

    def join(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return other


class Gate(LiveEdit):
    """The gate of each head in the last row, for the tokens that `toward` is told. `gated`: how
    many heads it turned down since then, summed over the batch."""

    def __init__(self, model: Any, scale: float, heads: set[Head] | None):

        self.model, self.scale, self.heads, self.gated = model, scale, heads, 0
        try:
            self.unembedding = model.vocabulary().W_U.detach()  # (d_model, vocabulary)
            self.output = {
                s.layer: model.head_weights(s.layer, s.tower).W_O.detach().float()
                for s in model.sites
                if s.is_main
            }  # (heads, d_head, d_model)
        except TapError as error:
            raise InputError(
                f"Route gating needs W_O and the unembedding of {model.name}: {error}"
            ) from error
        self.columns: torch.Tensor | None = None

    def toward(self, tokens: torch.Tensor) -> None:
        """The token of each row (batch,) whose prediction is gated next."""
        self.columns = self.unembedding[:, tokens.to(self.unembedding.device)].float()
        self.gated = 0

    def touches(self, call: AttentionCall) -> bool:
        return call.site.is_main and call.site.layer in self.output

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        image = call.images
        if image is None or self.columns is None or call.query is None or call.key is None:
            return z
        site, n = call.site, call.n_queries
        last = call.part(n - 1, n)
        assert last.query is not None and last.key is not None
        start = call.mask.k_start
        seen = torch.zeros(len(z), call.n_keys, dtype=torch.bool, device=z.device)
        here = image[:, start : start + call.n_keys].to(z.device)
        seen[:, : here.shape[1]] = here
        value = call.value.float() * seen[:, None, :, None]  # what the image alone would give
        out = attention(last.query.float(), last.key.float(), value, **last.settings).out
        vision = out[:, :, 0].float()  # (batch, heads, d_head)
        whole = z[:, -1].float()
        worth = torch.einsum("hdm,mb->bhd", self.output[site.layer], self.columns).to(whole)
        of_image, of_text = (vision * worth).sum(-1), ((whole - vision) * worth).sum(-1)
        gated = (of_image * of_text < 0) & (of_image.abs() < of_text.abs())  # (batch, heads)
        if self.heads is not None:
            mine = [Head(site.layer, h, site.tower) in self.heads or Head(site.layer, h)
                    in self.heads for h in range(site.n_heads)]  # fmt: skip
            gated = gated & torch.tensor(mine, device=gated.device)
        self.gated += int(gated.sum())
        new = torch.where(gated[..., None], vision + self.scale * (whole - vision), whole)
        return torch.cat([z[:, :-1], new[:, None].to(z.dtype)], 1)
