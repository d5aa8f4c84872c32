"""A second prediction of the text that `generate` writes, from other inputs, and what joins it with
the model's own."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.logits_process import LogitsProcessor

from interp.errors import InputError
from interp.inputs.forward import positions
from interp.procedures.decoding import check_procedure
from interp.vision.prompts import checked, own_positions

if TYPE_CHECKING:
    from interp_hooks.edit import Edit, LiveEdit
    from interp_hooks.model import HookedModel

#: inputs of a forward that a branch sets itself
OWN = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
)


class Branch:
    """The model on the same token slots with other inputs: another image, or fewer tokens that are
    seen. It has a cache of its own, which follows `generate`: rows of several texts a prompt, rows
    that beams move, one token at a time.

    Edits and observers around `generate` are those of the model's own prediction; the branch runs
    without, under its own `edits`.

    Args:
        prompt: (batch, slots) token ids; visible: (batch, slots), 0 for tokens that nobody sees
            (positions are counted without them); more: further inputs of the prompt's forward, such
                as pixel_values.
        read: (batch, slots) ids that it reads in place of the prompt's, in a prompt of words alone.
    """

    def __init__(
        self,
        model: HookedModel,
        prompt: torch.Tensor,
        visible: torch.Tensor,
        more: Mapping[str, Any],
        edits: tuple[Edit | LiveEdit, ...] = (),
        read: torch.Tensor | None = None,
    ):
        self.edits, self.read = edits, read
        self.model, self.prompt, self.visible, self.more = model, prompt, visible.long(), dict(more)
        self._seen: torch.Tensor | None = None  # (rows, slots) read so far
        self._mask = self.visible
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary): logits of the next token after input_ids (rows, slots). Raises
        `InputError` for ids that do not go on with the prompt, or with what was read before."""
        start = input_ids.shape[1] == self.prompt.shape[1]
        logits = self._start(input_ids) if start else self._follow(input_ids)
        self._seen = input_ids
        return logits

    def fork(self) -> Branch:
        """The same, as far as it has read, with a cache of its own."""
        other = copy.copy(self)
        other._cache = copy.deepcopy(self._cache)
        return other

    def _run(self, ids: torch.Tensor, more: Mapping[str, Any]) -> torch.Tensor:
        inputs: dict[str, Any] = dict(
            input_ids=ids, attention_mask=self._mask, use_cache=True, **more
        )
        if "position_ids" in self.model.accepts:
            inputs["position_ids"] = positions(self._mask)[:, -ids.shape[1] :]
        if "logits_to_keep" in self.model.accepts:
            inputs["logits_to_keep"] = 1
        with self.model.clean(), self.model.edit(*self.edits) if self.edits else nullcontext():
            own = own_positions(self.model) if self.read is None else {}
            out = self.model(**{**inputs, **own})
        self._cache = out.past_key_values
        return out.logits[:, -1]

    def _start(self, ids: torch.Tensor) -> torch.Tensor:
        """Each prompt is read once, also where several rows go on from it."""
        each = max(1, len(ids) // len(self.prompt))
        prompt = self.prompt.to(ids.device)
        whole = prompt.repeat_interleave(each, 0)
        if whole.shape != ids.shape or not torch.equal(whole, ids):
            raise InputError(
                "This logits processor was made for another prompt; make one from the inputs of "
                "generate."
            )
        self._mask = self.visible.to(ids.device)
        read = prompt if self.read is None else self.read.to(ids.device)
        logits = self._run(read, self.more)
        if each > 1:
            self._cache.batch_repeat_interleave(each)
            self._mask, logits = (x.repeat_interleave(each, 0) for x in (self._mask, logits))
        return logits

    def _follow(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows in the order of `ids`, whose last token is new."""
        past = self._seen
        if past is None or ids.shape[1] != past.shape[1] + 1:
            raise InputError(
                "This logits processor follows generate token by token, from the "
                "prompt it was made for; "
                "assisted generation goes another way."
            )
        if not torch.equal(ids[:, :-1], past):
            same = torch.stack([(row == past).all(-1) for row in ids[:, :-1]])  # (rows, rows seen)
            if not bool(same.any(1).all()):
                raise InputError(
                    "This logits processor was used for another text in between; make one a text."
                )
            order = same.int().argmax(1)
            self._cache.reorder_cache(order)
            self._mask = self._mask[order]
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return self._run(ids[:, -1:], dict(past_key_values=self._cache))


class TwoBranches(LogitsProcessor):
    """A logits processor that joins the model's own scores with those of a `Branch`, and keeps
    tokens whose own score is at least the best one's + ln β. Scores that come as log-probabilities
    (beam search) go as such."""

    name: str

    def __init__(self, model: HookedModel, beta: float):
        if not 0 <= beta <= 1:
            raise InputError(f"β of {self.name} is between 0 (all tokens stay) and 1, not {beta}.")
        check_procedure(model, self.name)
        self.model, self.beta = model, beta
        self.branch: Branch | None = None  # made where it matters

    @abstractmethod
    def join(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The new scores of two (rows, vocabulary)."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary): the scores of the next token after input_ids (rows, slots)."""
        joined = (
            scores if self.branch is None else self.join(scores, self.branch(input_ids).to(scores))
        )
        if self.beta > 0:
            bound = scores.amax(-1, keepdim=True) + math.log(self.beta)
            joined = joined.masked_fill(scores < bound, -torch.inf)
        if joined is not scores and bool((scores.logsumexp(-1).abs() < 1e-3).all()):
            joined = joined.log_softmax(-1)
        return joined


def prompt_of(
    model: HookedModel, inputs: Mapping[str, Any], what: str
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(ids, mask, further inputs) of a prompt with an image. Raises `InputError`."""
    ids, mask = checked(model, inputs, what)
    return ids, mask, {name: value for name, value in inputs.items() if name not in OWN}
