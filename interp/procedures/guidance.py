"""Guidance: away from a second prediction that is made under edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from interp.errors import InputError
from interp.inputs.forward import forward
from interp.inputs.tokenizer import pad_id, stop_tokens
from interp.procedures.decoding import Choice, check_procedure, decode, token_ids
from interp_hooks.edit import BoundEdit, CallEdit, LiveEdit
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel
    from interp_hooks.protocol import Model


class _Switch(LiveEdit):
    """An edit that can be turned off without leaving its block (entering again would bind it
    again)."""

    def __init__(self, edit: Edit, model: HookedModel):
        self.edit, self.on = edit, False
        self.bound = _Switched(edit.bind(model), self)

    def bind(self, model: Model) -> CallEdit:
        return self.bound

    def is_identity(self) -> bool:
        return self.edit.is_identity()


class _Switched(BoundEdit[CallEdit]):
    """What a block holds of a `_Switch`."""

    def __init__(self, edit: CallEdit, switch: _Switch):
        super().__init__(edit)
        self.switch = switch

    def touches(self, call: AttentionCall) -> bool:
        """Whether it is on and the edit touches the call."""
        return self.switch.on and self.edit.touches(call)


class _Pair:
    """Plain and perturbed predictions of one text, each with its own cache."""

    def __init__(self, model: HookedModel, switches: Sequence[_Switch], scale: float):
        self.model, self.switches, self.scale = model, switches, scale
        self.caches: dict[bool, Any] = {}

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **more: Any
    ) -> torch.Tensor:
        """l + w (l − l_perturbed) of one forward, (batch, tokens or kept, vocabulary)."""
        plain = self._run(False, input_ids, attention_mask, more)
        if self.scale == 0:
            return plain
        return plain + self.scale * (plain - self._run(True, input_ids, attention_mask, more))

    def _run(
        self, on: bool, ids: torch.Tensor, mask: torch.Tensor | None, more: dict[str, Any]
    ) -> torch.Tensor:
        for switch in self.switches:
            switch.on = on
        try:
            if more.get("use_cache"):
                more = dict(more, past_key_values=self.caches.get(on))
            out = forward(self.model, ids, mask, **more)
        finally:
            for switch in self.switches:
                switch.on = False
        self.caches[on] = getattr(out, "past_key_values", None)
        return logits_of(out)


@contextmanager
def _pair(model: HookedModel, edits: Sequence[Edit], scale: float) -> Iterator[_Pair]:
    if scale != 0 and not edits:
        raise InputError("Guidance needs edits that perturb the second prediction, like SoftPAG.")
    switches = [_Switch(e, model) for e in edits]
    active = switches if scale != 0 else []
    with model.edit(*(cast("Edit", s) for s in active)):
        yield _Pair(model, active, scale)


@torch.no_grad()
def guided_logits(
    model: Any,
    edits: Sequence[Edit],
    scale: float,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits guided away from what edits predict: l + w (l − l_perturbed).

    With l_perturbed predicted under `edits` (perturbed-attention guidance in logits; Ahn et al.
    2025, arXiv 2506.10978 write ε + w (ε − ε_pert)). w = 0 is the plain prediction.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        edits: what perturbs the second prediction.
        scale: w.
        input_ids, attention_mask: (batch, tokens).

    Returns:
        (batch, tokens, vocabulary).

    Raises:
        InputError: no edits, and w is not 0.
        EditError, HeadError: an edit that the model can't take.

    Example:
        >>> ids = torch.arange(8)[None]
        >>> edits = [interp.edits.SoftPAG(1.0)]
        >>> plain = interp.procedures.guided_logits(model, edits, 0.0, ids)
        >>> bool(torch.allclose(plain, model.logits(ids)))
        True
    """
    from interp.loading import load

    with _pair(hooked := load(model), edits, scale) as pair:
        return pair(input_ids.to(hooked.device), attention_mask)


@torch.no_grad()
def guided_generate(
    model: Any,
    edits: Sequence[Edit],
    scale: float,
    prompt: str | Sequence[int] | torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 64,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> torch.Tensor:
    """Generates with guidance away from what edits predict, token by token with two caches.

    From the logits of `guided_logits`.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        edits: what perturbs the second prediction, at prefill and decode as their scopes say.
        scale: w.
        prompt: text, ids, or (batch, tokens) ids, left-padded as `attention_mask` says.
        attention_mask: (batch, tokens) of such ids.
        max_new_tokens: at most so many.
        sample: draw from softmax(logits / temperature) cut to `top_p`, seeded; otherwise greedy.
        temperature, top_p, seed: of the draws.

    Misleads:
        What the edits change is exaggerated whether it was good or bad. The paper's conventions of
        scale are of image diffusion and are not verified for text.

    Returns:
        Prompt and new tokens, (batch, tokens).

    Raises:
        InputError: no edits, no cache, an empty prompt.
        EditError, HeadError: an edit that the model can't take.

    Example:
        >>> edits, prompt = [interp.edits.SoftPAG(1.0)], [[1, 20, 30]]
        >>> out = interp.procedures.guided_generate(
        ...     model, edits, 0.5, torch.tensor(prompt), max_new_tokens=2
        ... )
        >>> out.shape
        torch.Size([1, 5])
    """
    from interp.loading import load

    hooked = load(model)
    check_procedure(hooked, "Guidance")
    choice = Choice(sample, temperature, top_p, seed)
    batched = isinstance(prompt, torch.Tensor) and prompt.ndim == 2
    ids = (
        cast(torch.Tensor, prompt)
        if batched
        else torch.tensor([token_ids(hooked, prompt, start=True)])
    )
    if not ids.numel():
        raise InputError("The prompt is empty; give some text to continue.")
    ids = ids.to(hooked.device)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(hooked.device)
    with _pair(hooked, edits, scale) as pair:
        holder = [mask]

        def step(tokens: torch.Tensor) -> torch.Tensor:
            holder[0] = torch.nn.functional.pad(holder[0], (0, 1), value=1)
            return pair(tokens[:, None], holder[0], use_cache=True)[:, -1]

        first = pair(ids, mask, use_cache=True, keep=1)[:, -1]
        continuation = decode(
            first, step, choice, max_new_tokens, stop_tokens(hooked), pad_id(hooked.tokenizer)
        )
    return torch.cat([ids, continuation], 1)
