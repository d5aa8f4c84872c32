"""The kinds of input that scores are measured on, and how each is run. One forward serves all
scores of a probe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp import tasks
from interp.inputs.text import check_context, forward, pad_id, rows_of_text
from interp.tasks import language
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.task import Text
from interp.vision import pictures
from interp.vision.sinks import published_dims, ratios, tau_of
from interp_hooks.huggingface.images import image_mask
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    from interp_hooks.call import Site
    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class Settings:
    """What a scan fixes for all probes."""

    context: int = 1024
    samples: int = 16
    seed: int = 0
    text: str | None = None
    images: str | None = None
    prompt: str | None = None


@dataclass
class ProbeBatch:
    """Rows run together: input_ids (batch, tokens), attention_mask or None, and what the scores
    need to know; `extra` are inputs beside these (the pixels of pictures)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)
    samples: int = 1
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """The work of a forward, in tokens; a vision tower's are as many again as its picture's in
        the prompt."""
        image = self.info.get("image")
        return self.input_ids.numel() + (0 if image is None else int(image.sum()))


Tell = Callable[[LayerStats], None]


class Probe(ABC):
    """Makes batches and runs one of them under a question."""

    name: str
    what: str

    @abstractmethod
    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        """The inputs, the same for the same settings."""

    def make(self, model: HookedModel, settings: Settings) -> list[ProbeBatch]:
        """`batches` for a model. Raises `InputError` where it can't be given such inputs."""
        return self.batches(model.tokenizer, settings)

    def run(self, model: HookedModel, batch: ProbeBatch, question: Question, tell: Tell) -> None:
        """One forward; each layer's statistics go to `tell`."""
        with model.watch(question, tell):
            forward(model, batch.input_ids, batch.attention_mask, keep=1)


class TextProbe(Probe):
    """Running text of `context` tokens, one row a sample."""

    name, what = "text", "running text"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        rows = rows_of_text(
            tokenizer, settings.text, settings.context, settings.samples, settings.seed
        )
        return [ProbeBatch(torch.tensor([r])) for r in rows]


class RepeatProbe(Probe):
    """Random tokens, twice, all samples in one batch; `info`: start (first random token), repeat
    (length)."""

    name, what = "repeat", "repeated random tokens"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        made = tasks.get("induction").sample(tokenizer, settings.samples, settings.seed)
        ids = torch.tensor([[*i.ids] for i in made])
        return [ProbeBatch(ids, None, dict(made[0].info), len(made))]


class DomainsProbe(Probe):
    """Prose and code side by side: rows 2i and 2i+1 are sample i in the first and the second
    domain."""

    name, what = "domains", "prose against code, 256 tokens"
    length = 256

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        length = min(self.length, settings.context)
        prose = rows_of_text(tokenizer, None, length, settings.samples, settings.seed)
        found = []
        reader = Text(tokenizer)
        for i, row in enumerate(prose):
            rng = np.random.default_rng([settings.seed, i, 1])
            code = language.code(rng, length)
            other = rows_of_text(tokenizer, code, length, 1, settings.seed)[0]
            other[: len(reader.bos)] = reader.bos
            found.append(ProbeBatch(torch.tensor([row, other])))
        return found


class QuestionProbe(Probe):
    """A needle prompt (row 0) and the same with the question replaced by "N/A" (row 1),
    left-padded.

    `info`: needle and question (start, end) of each row, in padded slots.
    """

    name, what = "question", "needle prompts, with the question and with N/A"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        found = []
        reader = Text(tokenizer)
        for i in needles(tokenizer, settings):
            (n0, n1), (q0, q1) = i.info["needle"], i.info["question"]
            prompt = list(i.prompt)
            null = reader.encode(" N/A")
            empty = prompt[:q0] + null + prompt[q1:]
            width = max(len(prompt), len(empty))
            rows, mask, spans = [], [], []
            for row, question in ((prompt, (q0, q1)), (empty, (q0, q0 + len(null)))):
                pad = width - len(row)
                rows.append([pad_id(tokenizer)] * pad + row)
                mask.append([0] * pad + [1] * len(row))
                spans.append(((n0 + pad, n1 + pad), (question[0] + pad, question[1] + pad)))
            found.append(ProbeBatch(torch.tensor(rows), torch.tensor(mask), dict(spans=spans)))
        return found


class NeedleProbe(Probe):
    """Greedy decoding after a needle prompt: the prompt but its last token is prefilled, then each
    step is watched.

    After `run`, `info["generated"]` holds the greedy tokens and `info["solved"]` whether they are
    the answer.
    """

    name, what = "needle", "needle in a haystack, greedy decode"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        return [
            ProbeBatch(torch.tensor([i.prompt]), None, dict(instance=i))
            for i in needles(tokenizer, settings)
        ]

    def run(self, model: HookedModel, batch: ProbeBatch, question: Question, tell: Tell) -> None:
        instance = batch.info["instance"]
        generated: list[int] = []
        ids = batch.input_ids
        steps = len(instance.accept)
        cache: dict[str, Any] = {}
        if model.has_cache:
            out = forward(model, ids[:, :-1], keep=1, use_cache=True)
            cache, ids = dict(past_key_values=out.past_key_values, use_cache=True), ids[:, -1:]
        for _ in range(steps):
            with model.watch(question, tell):
                out = forward(model, ids, keep=1, **cache)
            logits = out if isinstance(out, torch.Tensor) else out.logits
            token = logits[:, -1].argmax(-1, keepdim=True).cpu()
            generated.append(int(token))
            ids = token if cache else torch.cat([ids, token], 1)
        batch.info["generated"] = generated
        batch.info["solved"] = all(
            t in ok for t, ok in zip(generated, instance.accept, strict=True)
        )


class ImageProbe(Probe):
    """A picture and a text about it, one a batch. `info`: image and after, (batch, slots) bool, the
    image's tokens and the words after the last of them; config, the model's.

    A question with groups is asked of 0 words, 1 the image, and, where it asks for 3 groups, 2 the
    image's sinks: its tokens with φ(x) = max_{d in D} |x[d]| / RMS(x) ≥ τ on entry of the layer
    (`tau_of`: 20, in narrow streams less). D is published for the model, or else where |x[d]| /
    RMS(x) ≥ τ at the sample's first real token, its massive activations there. `info["defined"]`:
    layer → (batch,) bool, whether there is such a d.
    """

    name, what = "image", "pictures and what is in them"

    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        raise TypeError("Pictures are read by a model's processor; use make.")

    def make(self, model: HookedModel, settings: Settings) -> list[ProbeBatch]:
        return [image_batch(model, given) for given in pictures.prompts(model, settings, told=True)]

    def run(self, model: HookedModel, batch: ProbeBatch, question: Question, tell: Tell) -> None:
        image = batch.info["image"]
        known = published_dims(model)
        first = (
            (image.new_ones(image.shape) if batch.attention_mask is None else batch.attention_mask)
            .int()
            .argmax(1)
        )
        sinks: dict[int, torch.Tensor] = {}
        defined = batch.info["defined"] = {}

        def look(place: str, layer: int, stream: torch.Tensor) -> None:
            residual.clear()  # nothing is kept but which tokens are sinks
            if place != "pre" or not wanted:
                return
            size = ratios(stream)  # (batch, tokens, d_model)
            tau = tau_of(size.shape[-1])
            dims = size[torch.arange(len(size)), first.to(size.device)] >= tau  # (batch, d_model)
            if known is not None:
                dims = torch.zeros_like(dims).index_fill(
                    1, torch.tensor(known, device=dims.device), True
                )
            sinks[layer] = size.masked_fill(~dims[:, None], 0).amax(-1) >= tau
            defined[layer] = dims.any(-1)

        def choose(site: Site) -> Question:
            asked = question.at(site)
            if not asked.n_groups or site.tower == "vision":
                return asked
            labels = image.long()
            if asked.n_groups > 2 and site.layer in sinks:
                labels = labels * (1 + sinks[site.layer].to(labels))
            return replace(asked, labels=labels)

        wanted = any(question.at(site).n_groups > 2 for site in model.sites)
        asking = SiteQuestion(names=question.names, z=question.z, call=question.call, choose=choose)
        with model.capture_resid(look) as residual, model.watch(asking, tell):
            forward(model, batch.input_ids, batch.attention_mask, keep=1, **batch.extra)


def image_batch(model: HookedModel, given: dict[str, Any]) -> ProbeBatch:
    """A batch for `ImageProbe` from the inputs that `interp.vision.with_images` makes (one prompt
    or several)."""
    extra = dict(given)
    ids, real = extra.pop("input_ids"), extra.pop("attention_mask", None)
    check_context(model, ids.shape[1])
    image = image_mask(model.module.config, ids)
    assert image is not None
    slots = torch.arange(1, ids.shape[1] + 1)
    after = slots > torch.where(image, slots, 0).amax(-1, keepdim=True)
    if real is not None:
        after &= real.bool()
    info = dict(image=image, after=after, config=model.module.config)
    return ProbeBatch(ids, real, info, len(ids), extra)


def needles(tokenizer: Any, settings: Settings) -> Sequence[tasks.Instance]:
    """Needle problems at a quarter, a half and the whole of the context."""
    return (
        NeedleInAHaystack().at(settings.context).sample(tokenizer, settings.samples, settings.seed)
    )


PROBES: dict[str, Probe] = {
    p.name: p
    for p in (
        TextProbe(),
        RepeatProbe(),
        DomainsProbe(),
        QuestionProbe(),
        NeedleProbe(),
        ImageProbe(),
    )
}
