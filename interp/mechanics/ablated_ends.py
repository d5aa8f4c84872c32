"""What the last token of some prompts says with heads ablated, begun again at the first layer that
an ablated head is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.ablate import Ablate
from interp.errors import EditError, InputError
from interp.inputs.batches import left_padded
from interp.inputs.forward import forward
from interp.inputs.tokenizer import pad_id
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp_hooks.heads import Head
    from interp_hooks.model import HookedModel

#: largest difference of logits between a forward begun in the middle and a whole one, relative to
#: the largest logit: above it the model hands more from block to block than their outputs
CLOSE = 1e-3


class AblatedEnds:
    """The ends of prompts under ablations, each of them at all tokens of a prompt.

    Args:
        model: the model.
        rows: token ids of each prompt.
        mode: as in `Ablate`.
        reference: of mean, resample and frozen ablation.

    Raises:
        InputError: no prompt, or heads that can't be ablated so in this model.

    Example:
        >>> from interp.mechanics.ablated_ends import AblatedEnds
        >>> ends = AblatedEnds(model, [[0, 5, 6], [0, 7, 8, 9]])
        >>> ends.log_probs([]).shape[0], ends.log_probs([interp.Head(1, 2)]).shape[0]
        (2, 2)
    """

    def __init__(
        self,
        model: HookedModel,
        rows: Sequence[Sequence[int]],
        mode: str = "uniform",
        reference: str | None = None,
    ):
        if not rows:
            raise InputError("Ends of prompts are asked for, and there is no prompt.")
        self.model, self._mode, self._reference = model, mode, reference
        self._ids, self._mask, _ = left_padded(rows, pad_id(model.tokenizer))
        with torch.no_grad(), model.block_outputs() as blocks:
            whole = self._run()
        self._blocks = dict(blocks)
        last = max(self._blocks, default=0)
        if last:
            with torch.no_grad(), model.resume(last, self._blocks[last - 1]):
                apart = float((self._run() - whole).abs().max())
            if not apart <= CLOSE * float(whole.abs().max()):
                self._blocks = {}

    def log_probs(self, heads: Sequence[Head]) -> torch.Tensor:
        """(prompts, vocabulary) float64 log-probabilities of the next token without these heads."""
        return self._ablated(heads).double().log_softmax(-1)

    def states(self, heads: Sequence[Head]) -> torch.Tensor:
        """(prompts, d_model) float64: what the unembedding reads at the last token.

        Raises `InputError` for a model whose final norm is not known.
        """
        with self.model.capture_resid() as stream:
            self._ablated(heads)
        if "final" not in stream:
            raise InputError(
                f"The final norm of {self.model.name} is not known; name it in layout=."
            )
        return stream["final"][:, -1].double().cpu()

    @torch.no_grad()
    def _ablated(self, heads: Sequence[Head]) -> torch.Tensor:
        edits = [Ablate(list(heads), self._mode, self._reference)] if heads else []
        start = min((h.layer for h in heads), default=0)
        try:
            with self.model.edit(*edits):
                if start - 1 not in self._blocks:
                    return self._run()
                with self.model.resume(start, self._blocks[start - 1]):
                    return self._run()
        except EditError as error:
            raise InputError(f"Heads of {self.model.name} can't be ablated: {error}") from error

    def _run(self) -> torch.Tensor:
        out: Any = forward(self.model, self._ids, self._mask, keep=1)
        return logits_of(out)[:, -1].float().cpu()  # (prompts, vocabulary)


def divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(rows,) KL(P ‖ Q) in nats of log-probabilities (rows, vocabulary).

    Example:
        >>> from interp.mechanics.ablated_ends import divergence
        >>> one, other = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> round(float(divergence(one[None], other[None])), 3)
        0.511
    """
    return torch.nn.functional.kl_div(other, one, reduction="none", log_target=True).sum(-1)
