"""What a task about pictures is: prompts with an image, answers in words, counts that metrics are
ratios of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from interp.errors import InputError
from interp.tasks.task import Instance, Task

if TYPE_CHECKING:
    import numpy as np

    from interp.inputs.tokenizer import Text


@dataclass(frozen=True)
class Picture:
    """One problem: a picture (or its file), what is asked, which picture it is (problems of one
    picture are not independent), and what the judge must know."""

    image: Any
    prompt: str
    group: int
    info: Mapping[str, Any] = field(default_factory=dict)


class ImageTask(Task):
    """Subclasses set `metrics` and write `problems` and `count`. The first metric is the
    headline."""

    #: metric → (summed above, summed below): each is Σ of the first counts over Σ of the second,
    #: over all problems
    metrics: ClassVar[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]]
    max_new_tokens: ClassVar[int]

    @abstractmethod
    def problems(self, n: int, seed: int = 0) -> list[Picture]:
        """`n` seeded problems (or the first n of a file's)."""

    @abstractmethod
    def count(self, answer: str, problem: Picture) -> dict[str, float]:
        """What of an answer the metrics count."""

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        raise InputError(
            f"The task {self.name} asks about pictures, so a tokenizer alone can't make it; use it "
            "through "
            "interp.evaluate with a vision-language model."
        )
