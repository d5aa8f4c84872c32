"""What a score is: a number per head, measured per sample on one kind of input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from interp.support.html import block

if TYPE_CHECKING:
    import torch

    from interp.inputs.pace import Pace
    from interp.probes.probe import ProbeBatch
    from interp.probes.settings import Settings
    from interp_hooks.heads import Head
    from interp_hooks.model import HookedModel
    from interp_hooks.question import Question
    from interp_hooks.recording import LayerStats


class Score(ABC):
    """A score of attention heads: the base class, one subclass a file.

    A score names the `probe` (kind of input) it is measured on, asks questions of the observed
    attention, and turns one layer's answers into one value per sample and head. Values are averaged
    over samples.

    Example:
        >>> from interp_hooks import Question
        >>> class Largest(Score):
        ...     name, title, probe = "largest", "Largest weight", "text"
        ...     def ask(self, batch):
        ...         return Question(frozenset({"max"}))
        ...     def measure(self, layer, batch):
        ...         return layer.mean("max")
        >>> layers, largest = [], Largest()
        >>> with model.watch(largest.ask(None), layers.append):
        ...     _ = model.logits(torch.arange(8)[None])
        >>> largest.measure(layers[2], None).shape
        torch.Size([1, 8])
    """

    #: column name, e.g. "induction"
    name: ClassVar[str]
    #: heading, e.g. "Induction"
    title: ClassVar[str]
    #: one sentence on how to read it
    reading: ClassVar[str]
    #: the formula, in plain text with Unicode symbols
    formula: ClassVar[str]
    #: where it comes from
    citation: ClassVar[str]
    #: "" for shares and rates, else "nats", "tokens", …
    unit: ClassVar[str] = ""
    #: fixed colour range, None: that of the data
    low: ClassVar[float | None] = 0.0
    high: ClassVar[float | None] = 1.0
    #: value from which a head counts as one of this kind, where the literature gives one
    threshold: ClassVar[float | None] = None
    #: what a head that reaches the threshold is called: "induction head"; "" for nothing
    role: ClassVar[str] = ""
    #: what one value belongs to: "head", "kv_head" or "layer". `measure` gives one a head all the
    #: same, equal within a key/value head's group or a layer.
    grain: ClassVar[str] = "head"
    #: how many tokens of an input it reads at most; None for all
    length: ClassVar[int | None] = None
    #: fewer samples than this are too few to say much, and a note says so
    least_samples: ClassVar[int] = 1
    #: which inputs it is measured on: a name in `interp.probes`
    probe: ClassVar[str]
    #: measured by `scores="default"`
    default: ClassVar[bool] = False
    #: only models that take images have it; for others "default" and "all" leave it out
    needs_images: ClassVar[bool] = False
    #: measured where it is known what a picture holds: on rendered scenes, not on pictures of a
    #: folder; for those "default" and "all" leave it out
    needs_scenes: ClassVar[bool] = False
    #: what of a site only some architectures have ("output_gate", "learned_sinks"); "default" and
    #: "all" leave the score out where no site has it
    needs_site: ClassVar[str] = ""
    #: only tokenizers that write common words as single tokens have it
    needs_words: ClassVar[bool] = False
    #: "" for heads of the main tower, or "vision"
    tower: ClassVar[str] = ""
    #: why it is not defined in a model that gives it nowhere, as a clause; "" where that can't be
    undefined: ClassVar[str] = ""

    #: whether the massive activations of the same texts are listed beside it
    lists_massive: ClassVar[bool] = False

    #: how well its strongest heads are drawn over a picture; 0: not at all
    drawn: ClassVar[int] = 0

    def __repr__(self) -> str:
        return f"<score {getattr(self, 'name', type(self).__name__)}>"

    def _repr_html_(self) -> str:
        facts = {
            "formula": getattr(self, "formula", ""),
            "unit": self.unit,
            "counts from": self.threshold,
            "such a head": self.role,
            "one value a": {"kv_head": "key/value head"}.get(self.grain, self.grain),
            "measured on": getattr(self, "probe", ""),
            "from": getattr(self, "citation", ""),
        }
        name, reading = getattr(self, "name", type(self).__name__), getattr(self, "reading", "")
        return block(getattr(self, "title", name), name, facts, notes=[reading])

    def at(self, tower: str) -> bool:
        """Whether heads of this tower have it, of those that the probe runs."""
        return not self.needs_images or (tower == "vision") == (self.tower == "vision")

    def defined(self, batch: ProbeBatch) -> bool:
        """Whether some head has a value on `batch`, where the batch tells (`undefined`: why
        not)."""
        return True

    def ask(self, batch: ProbeBatch) -> Question:
        """The statistics this score needs on `batch`."""
        from interp_hooks.question import Question

        return Question()

    @abstractmethod
    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        """(samples, heads) float: the score of each sample and head of one layer. NaN marks "not
        defined here"."""


class DecodeScore(Score):
    """A score of decode steps: judged when the generated tokens are known."""

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        raise TypeError(f"{self.name} is measured over decode steps; use measure_steps.")

    @abstractmethod
    def measure_steps(self, steps: Sequence[LayerStats], batch: ProbeBatch) -> torch.Tensor:
        """(samples, heads) from one layer's statistics at every decode step, in order."""


class PassScore(Score):
    """A score of one layer that depends on others: judged when the whole forward was seen."""

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        raise TypeError(f"{self.name} is measured over a whole forward; use measure_pass.")

    @abstractmethod
    def measure_pass(self, layers: Sequence[LayerStats], batch: ProbeBatch) -> list[torch.Tensor]:
        """(samples, heads) of each layer, from all layers' statistics in order."""


class ModelScore(Score):
    """A score that needs runs of its own (ablations, the residual stream)."""

    #: forwards a sample
    passes: ClassVar[str]
    #: where the model's tokenizer lacks what it needs, other scores stand, and a note says so
    optional: ClassVar[bool] = False

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        raise TypeError(f"{self.name} runs the model itself; use compute.")

    @abstractmethod
    def cost(self, model: HookedModel, settings: Settings) -> int:
        """Number of tokens that `compute` will run through the model."""

    @abstractmethod
    def steps(self, model: HookedModel, settings: Settings) -> int:
        """Number of results that `compute` yields."""

    def seconds(self, model: HookedModel, settings: Settings, pace: Pace) -> float:
        """How long `compute` takes, for the plan: by default that of as many tokens as it costs in
        plain forwards."""
        length = min(self.length or 256, settings.context)
        return pace.plain(1, length) * self.cost(model, settings) / length

    @abstractmethod
    def compute(
        self, model: HookedModel, settings: Settings
    ) -> Iterator[list[tuple[Head, list[float]]]]:
        """Yields, step by step, (head, values over samples)."""

    def inputs(self, model: HookedModel, settings: Settings) -> list[torch.Tensor]:
        """What `compute` reads beside the probes' inputs, for the record of a result's inputs."""
        if not self.needs_images:
            return []
        return [t for inputs in settings.pictures.inputs(model) for t in inputs.values()]
