"""One input of an encoder-decoder model: what it tells, where its cross heads look, and its input
made ready for `interp.mechanics.saliency`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError, TapError
from interp.mechanics.saliency import Entered
from interp_hooks import Question, WeightRows
from interp_hooks.logits import logits_of
from interp_hooks.question import SiteQuestion

if TYPE_CHECKING:
    from interp_hooks import HookedModel
    from interp_hooks.call import AttentionCall, Site

#: what an encoder's input may be called: sound, or tokens
FEATURES = ("input_features", "input_values")
#: largest difference of logits by which embeddings may miss their tokens
CLOSE = 1e-3


@dataclass(frozen=True)
class Crossing:
    """One sample: `inputs` of the encoder, and the `told` tokens, whose rows predict them."""

    model: HookedModel
    inputs: dict[str, torch.Tensor]
    told: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the encoder's input is called."""
        return next(n for n in (*FEATURES, "input_ids") if n in self.inputs)

    def decoder_ids(self) -> torch.Tensor:
        """(1, told): the token before each told one, the start first."""
        start = self.model.module.config.decoder_start_token_id
        return torch.tensor([[start, *self.told[:-1]]], device=self.model.device)

    def margins(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows, told) of logits (rows, told, vocabulary): a told token's less the mean logit."""
        told = torch.tensor(self.told, device=logits.device)
        logits = logits.double()
        return logits[:, torch.arange(len(told)), told] - logits.mean(-1)

    def rows(self) -> dict[Site, np.ndarray]:
        """Cross-attention → (heads, told, keys): the row that predicts each told token."""
        found: dict[Site, list[torch.Tensor]] = {}

        def take(call: AttentionCall, start: int, weights: torch.Tensor) -> None:
            found.setdefault(call.site, []).append(weights[0].double().cpu())

        asked = Question(weights=WeightRows(take))
        crosses = SiteQuestion(choose=lambda s: asked if s.kind == "cross" else Question())
        with torch.no_grad(), self.model.watch(crosses, lambda stats: None):
            self.model(**self.inputs, decoder_input_ids=self.decoder_ids(), use_cache=False)
        return {site: torch.cat(parts, 1).numpy() for site, parts in found.items()}

    def entered(self, of: str, baseline: str) -> Entered:
        """The encoder's input, or its output, and the margin of each told token."""
        if of == "encoder":
            return self._output(baseline)
        return self._tokens(baseline) if self.name == "input_ids" else self._features(baseline)

    def _features(self, baseline: str) -> Entered:
        """Frames of sound: (bins, frames) in Whisper, (frames, bins) or (samples,) in others."""
        name, given = self.name, self.inputs[self.name][0].detach()
        bins = getattr(self.model.module.config, "num_mel_bins", None)
        turned = given.ndim == 2 and len(given) == bins
        rows = given.T if turned else given
        value = rows[:, None] if given.ndim == 1 else rows  # (frames, bins)

        def place(leaf: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: leaf.mT if turned else leaf if given.ndim == 2 else leaf[..., 0]}

        return self._made(value, _away(value, value, baseline), place)

    def _tokens(self, baseline: str) -> Entered:
        table = self.model.module.get_input_embeddings()
        with torch.no_grad():
            value = table(self.inputs["input_ids"])[0]  # (tokens, d_model)
            every = torch.arange(len(table.weight), device=value.device)
            sums = [table(some).double().sum(0) for some in every.split(8192)]
        mean = (torch.stack(sums).sum(0) / len(every)).to(value)[None]
        away = _away(value, mean, baseline)
        entered = self._made(value, away, lambda leaf: dict(inputs_embeds=leaf))
        self._check_embeddings(entered)
        return entered

    def _check_embeddings(self, entered: Entered) -> None:
        own = self.model(**self.inputs, decoder_input_ids=self.decoder_ids(), use_cache=False)
        wanted = self.margins(logits_of(own)).detach()
        missed = float((entered.outputs(entered.still()) - wanted).abs().max())
        if not missed <= CLOSE:
            raise TapError(
                f"{self.model.name} makes more of its tokens than their embeddings before its "
                f"encoder (logits differ by {missed:.2g}), so they can't be replaced; "
                "use of='encoder'."
            )

    def _output(self, baseline: str) -> Entered:
        from transformers.modeling_outputs import BaseModelOutput

        encoder = self.model.module.get_encoder()
        mask = {k: v for k, v in self.inputs.items() if k == "attention_mask"}
        with torch.no_grad():
            value = encoder(**{self.name: self.inputs[self.name], **mask})[0][0]

        def place(leaf: torch.Tensor) -> dict[str, Any]:
            return dict(encoder_outputs=BaseModelOutput(last_hidden_state=leaf))

        return self._made(value.detach(), _away(value, value, baseline), place)

    def _made(
        self, value: torch.Tensor, away: torch.Tensor, place: Callable[[torch.Tensor], Any]
    ) -> Entered:
        ids, more = (
            self.decoder_ids(),
            {k: v for k, v in self.inputs.items() if k not in (*FEATURES, "input_ids")},
        )

        def run(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows = len(shift)
            leaf = (value + shift).detach().requires_grad_()
            wide = {k: v.expand(rows, *v.shape[1:]) for k, v in more.items()}
            with torch.enable_grad():
                out = self.model(
                    **place(leaf),
                    **wide,
                    decoder_input_ids=ids.expand(rows, -1),
                    use_cache=False,
                )
                return self.margins(logits_of(out)), leaf

        return Entered(self.model, value, away, run)


def _away(value: torch.Tensor, of: torch.Tensor, baseline: str) -> torch.Tensor:
    """(positions, width): the mean row of `of`, or zeros."""
    if baseline == "zero":
        return torch.zeros_like(value)
    return of.mean(0).detach().expand_as(value)


def crossings(
    model: HookedModel,
    samples: Sequence[Any],
    targets: Sequence[Sequence[int]] | None,
    max_new_tokens: int,
) -> list[Crossing]:
    """The samples, with what the model tells of each where no targets are given.

    Raises `InputError` for a model without cross-attention, samples that are not its inputs, or one
    of which nothing is told.
    """
    if not any(s.kind == "cross" for s in model.sites):
        raise InputError(
            f"{model.name} has no cross-attention; use interp.mechanics.agreement for models that "
            "read their own text."
        )
    if targets is not None and len(targets) != len(samples):
        raise InputError(f"There are {len(samples)} samples and {len(targets)} targets.")
    found = []
    for i, sample in enumerate(samples):
        inputs = _inputs(model, sample)
        told = _told(model, inputs, max_new_tokens) if targets is None else targets[i]
        if not len(told):
            raise InputError(f"Nothing is told of sample {i}, so no row of it can be judged.")
        found.append(Crossing(model, inputs, tuple(int(t) for t in told)))
    return found


def _inputs(model: HookedModel, sample: Any) -> dict[str, torch.Tensor]:
    if isinstance(sample, str):
        if model.tokenizer is None:
            raise InputError(f"{model.name} came without a tokenizer; give token ids.")
        sample = model.tokenizer(sample, return_tensors="pt")
    if not isinstance(sample, Mapping):
        raise InputError(
            "A sample is a text, or a mapping of what the model's forward takes of one (input_ids, "
            f"or input_features), not {type(sample).__name__}."
        )
    inputs = {k: v.to(model.device) for k, v in sample.items() if isinstance(v, torch.Tensor)}
    if not {*FEATURES, "input_ids"} & set(inputs):
        raise InputError(
            f"A sample has input_ids or {' or '.join(FEATURES)}, not {sorted(inputs)}."
        )
    if any(len(v) != 1 for v in inputs.values()):
        raise InputError("A sample is one input, (1, …); give a list of samples.")
    return inputs


def _told(model: HookedModel, inputs: dict[str, torch.Tensor], new: int) -> list[int]:
    """What the model tells greedily, without start and end, in the places that it has."""
    config = model.module.config
    places = getattr(config, "max_target_positions", None)
    new = new if places is None else min(new, places - 1)
    with torch.no_grad(), _errors_only():
        row = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0].tolist()
    row = row[1:] if row[:1] == [config.decoder_start_token_id] else row
    return row[:-1] if row[-1:] == [config.eos_token_id] else row


@contextmanager
def _errors_only() -> Iterator[None]:
    """Without transformers' warnings of a checkpoint's own settings of generation, one a sample."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
