"""What a probe is: a kind of input that scores are measured on, and how it is run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from interp.inputs.chunks import watched
from interp.probes.settings import Settings
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    from interp.inputs.pace import Pace
    from interp_hooks.heads import Head
    from interp_hooks.model import HookedModel


@dataclass
class ProbeBatch:
    """Rows run together, and what the scores need to know of them.

    Attributes:
        input_ids: (batch, tokens).
        attention_mask: the same, or None.
        info: what the scores need to know.
        samples: how many samples it holds.
        extra: inputs beside these (the pixels of pictures).
        chunk: how many tokens are read at a time; None for all in one forward.

    Example:
        >>> interp.probes.ProbeBatch(torch.arange(8)[None]).tokens
        8
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)
    samples: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    chunk: int | None = None

    @property
    def tokens(self) -> int:
        """The work of a forward, in tokens; a vision tower's are as many again as its picture's in
        the prompt."""
        image = self.info.get("image")
        seen = self.info.get("slots", 0) if image is None else int(image.sum())
        return self.input_ids.numel() + seen

    @property
    def length(self) -> int:
        """Tokens of a row: of the prompt, or of the picture where there is none."""
        return self.input_ids.shape[1] or int(self.info.get("slots", 0))


#: who gets each layer's statistics
Callback = Callable[[LayerStats], None]


class Probe(ABC):
    """A kind of input that scores are measured on: makes batches and runs one under a question.

    Example:
        >>> settings = interp.probes.Settings(context=64, samples=2)
        >>> batches = interp.probes.get("text").batches(model.tokenizer, settings)
        >>> sum(len(batch.input_ids) for batch in batches)
        2
    """

    name: str
    what: str
    #: a model that can't be given such inputs, or none so long, is scanned without them
    optional: bool = False
    #: its problems are put in a format (`Settings.format`)
    posed: bool = False

    @abstractmethod
    def batches(self, tokenizer: Any, settings: Settings) -> list[ProbeBatch]:
        """The inputs, the same for the same settings."""

    def make(self, model: HookedModel, settings: Settings) -> list[ProbeBatch]:
        """`batches` for a model. Raises `InputError` where it can't be given such inputs."""
        return self.batches(model.tokenizer, settings)

    def run(
        self, model: HookedModel, batch: ProbeBatch, question: Question, callback: Callback
    ) -> None:
        """One forward, or one a chunk; each layer's statistics go to `callback`."""
        watched(model, question, callback, batch.input_ids, batch.attention_mask, batch.chunk)

    def seconds(self, batch: ProbeBatch, pace: Pace) -> float:
        """How long a run of the batch takes, for the plan."""
        return pace.watched(1, batch.length) * batch.tokens / batch.length

    def passes(self, batches: Sequence[ProbeBatch]) -> str:
        """How many tokens the longest input has, and how many there are, "1,024 × 16", for the
        plan."""
        longest = max(b.input_ids.shape[1] for b in batches)
        return f"{longest:,} × {sum(b.samples for b in batches)}"

    def outcome(self, batch: ProbeBatch) -> float | None:
        """A number that a run of the batch gave beside the scores, which is saved with them; None
        where there is none."""
        return None

    def remarks(
        self, tokenizer: Any, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> list[str]:
        """What a reader of the scores must know of these inputs, and of what came out."""
        return []

    def floor(
        self, model: HookedModel, batches: Sequence[ProbeBatch], outcomes: Sequence[float]
    ) -> str | None:
        """Why the model can't do what these inputs ask of it, so that scores on them mean nothing;
        None where it can."""
        return None

    def overlays(self, model: HookedModel, settings: Settings, heads: Sequence[Head]) -> list[Any]:
        """Pictures of where these heads look (`interp.vision.overlay.Overlay`), for the report."""
        return []
