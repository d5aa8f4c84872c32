"""What a task is: seeded prompts with known answers, for any tokenizer.

An `Instance` is a token sequence, the positions whose logits are judged, and which tokens are right
or wrong there. Several-token answers are teacher forced: a greedy decode is exact if and only if
the arg-max is right at every forced position, so one definition serves one forward pass and
step-by-step decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from interp.errors import InputError
from interp.inputs import lexicon
from interp.inputs.batches import left_padded
from interp.inputs.tokenizer import Text
from interp.tasks.formats import SHOTS, Problem, Wording, check_format, worded
from interp.tasks.metric import Judge, margin

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Instance:
    """One problem, as token ids.

    Attributes:
        ids: the prompt followed, for answers of several tokens, by all but the last answer token.
        positions: the logits at `positions[i]` should predict a token of `accept[i]` rather than
            one of `wrong[i]`.
        accept, wrong: token ids for each judged position.
        corrupted: of the same length, and calls for another answer.
        info: what a score or a plot needs (spans, names).

    Example:
        >>> problem = interp.tasks.get("ioi").sample(model.tokenizer, 1)[0]
        >>> len(problem.ids) == len(problem.corrupted), len(problem.positions)
        (True, 1)
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    accept: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]
    corrupted: tuple[int, ...]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids up to and including the first judged position: what a decode starts from."""
        return self.ids[: self.positions[0] + 1]


@dataclass(frozen=True)
class Batch:
    """Left-padded instances as one batch.

    Attributes:
        input_ids, attention_mask: (batch, tokens).
        offset: `offset[b]` pads precede row b.
        instances: what was padded.

    Example:
        >>> problems = interp.tasks.get("ioi").sample(model.tokenizer, 2)
        >>> batch = interp.tasks.collate(problems, pad_id=0)
        >>> batch.input_ids.shape == batch.attention_mask.shape, len(batch.offset)
        (True, 2)
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    offset: tuple[int, ...]
    instances: tuple[Instance, ...]


def collate(instances: Sequence[Instance], pad_id: int, which: str = "ids") -> Batch:
    """Left-pads instances into one batch.

    Args:
        instances: the problems.
        pad_id: the token to pad with.
        which: "ids", "corrupted" or "prompt".

    Returns:
        A `Batch`.

    Example:
        >>> problems = interp.tasks.get("ioi").sample(model.tokenizer, 2)
        >>> interp.tasks.collate(problems, pad_id=0, which="corrupted").input_ids.shape[0]
        2
    """
    ids, mask, offsets = left_padded([getattr(i, which) for i in instances], pad_id)
    return Batch(ids, mask, offsets, tuple(instances))


@dataclass(frozen=True)
class Task:
    """A generator of seeded problems: the base class.

    Subclasses set `name`, `summary`, `citation`, `judge` and write `compose`, or `instance` where
    the problem is no text; those that compose can be posed in several `formats`.

    Args:
        format: how problems are put: "bare", "lead", "few-shot", "chat", what the task has of them.

    Example:
        >>> task = interp.tasks.get("ioi")
        >>> short, longer = (task.sample(model.tokenizer, n, seed=1) for n in (2, 4))
        >>> longer[:2] == short
        True
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    judge: ClassVar[Judge] = "top1"
    #: expected accuracy of guessing, for plots; None where it is about zero
    chance: ClassVar[float] = 0.0

    #: the formats that its problems can be put in (`interp.tasks.formats`)
    formats: ClassVar[tuple[str, ...]] = ("bare",)

    format: str = field(default="bare", kw_only=True)

    def __post_init__(self) -> None:
        check_format(self.name, self.format, self.formats)

    @property
    def source(self) -> str:
        """What `interp.tasks.get` makes it of again: its name, or its file."""
        return self.name

    def brief(self) -> Task:
        """This task with its problems as short as they get, to try a format on."""
        return self

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        """One problem for this tokenizer; by default what `compose` says, judged where the prompt
        ends."""
        problem = self.compose(text, rng)
        return self._from_problem(text, problem, self.worded(text, problem, rng))

    def worded(self, text: Text, problem: Problem, rng: np.random.Generator) -> Wording:
        """The problem in this task's format; solved ones are drawn after it, so that it is the same
        problem in every format."""
        shots = [self.compose(text, rng) for _ in range(SHOTS * (self.format == "few-shot"))]
        return worded(text, self.format, problem, shots)

    def sample(self, tokenizer: Any, n: int, seed: int = 0) -> list[Instance]:
        """Seeded problems; longer samples extend shorter ones.

        The i-th depends on (seed, i) alone.

        Args:
            tokenizer: the model's.
            n: how many.
            seed: of the problems.

        Example:
            >>> len(interp.tasks.get("ioi").sample(model.tokenizer, 3))
            3
        """
        text = Text(tokenizer)
        return [self.instance(text, np.random.default_rng([seed, i])) for i in range(n)]

    def document(self, text: Text, rng: np.random.Generator) -> str:
        """A solved problem as training text."""
        problem = self.compose(text, rng)
        return f"{problem.clean}{problem.answer}."

    def compose(self, text: Text, rng: np.random.Generator) -> Problem:
        """The problem as text (tasks made of tokens rather than words have none)."""
        raise InputError(f"The task {self.name} has no text form.")

    def _from_problem(self, text: Text, problem: Problem, wording: Wording) -> Instance:
        ids, corrupted = wording.clean, wording.corrupted
        if len(ids) != len(corrupted):
            raise InputError(
                f"The task {self.name} got prompts of different lengths from this tokenizer "
                f"({len(ids)} and {len(corrupted)} tokens); choose another task."
            )
        accept = first_tokens(text, [wording.answer])
        wrong = first_tokens(text, wording.wrong)
        if set(accept) & set(wrong):
            raise InputError(
                f"The task {self.name} has right and wrong answers that begin with the same token "
                "for this tokenizer, so they can't be told apart; choose another task."
            )
        return Instance(
            tuple(ids), (len(ids) - 1,), (accept,), (wrong,), tuple(corrupted), dict(problem.info)
        )

    def score(self, logits: torch.Tensor, instance: Instance) -> tuple[float, float]:
        """(correct, margin) of one instance, from its logits at the judged positions.

        correct: "top1": share of positions whose arg-max is accepted; "exact": 1 if all are;
        "choice": arg-max among accepted and wrong tokens only; "mass": 1 if the accepted tokens'
        probability exceeds the wrong ones'; "recall": judged by `heard` instead. margin: for "mass"
        the difference of the two probabilities, in [−1, 1]; else the mean over positions of the
        best accepted logit minus the mean wrong logit (log-probability where there is no wrong
        token), in nats.

        Args:
            logits: (judged positions, vocabulary).
            instance: the problem.

        Example:
            >>> task = interp.tasks.get("ioi")
            >>> problem = task.sample(model.tokenizer, 1)[0]
            >>> logits = model.logits(torch.tensor([problem.ids])).detach()
            >>> correct, margin = task.score(logits[0, list(problem.positions)], problem)
            >>> correct in (0.0, 1.0)
            True
        """
        logits = logits.float()
        margins = self._margins(logits, instance)
        hits = []
        for row, accept, wrong, gap in zip(
            logits, instance.accept, instance.wrong, margins, strict=True
        ):
            if self.judge == "mass":
                hits.append(bool(gap > 0))
                continue
            rivals = row[list(wrong)] if self.judge == "choice" else row
            hits.append(bool(row[list(accept)].max() >= rivals.max()) if len(rivals) else True)
        correct = float(all(hits)) if self.judge == "exact" else float(np.mean(hits))
        return correct, float(np.mean([float(m) for m in margins]))

    def heard(self, tokenizer: Any, instance: Instance, said: Sequence[int]) -> tuple[float, float]:
        """(correct, margin) of what a model said freely, for tasks judged by "recall"."""
        raise InputError(f"The task {self.name} is not judged by what a model says freely.")

    def margin(self, logits: torch.Tensor, instance: Instance) -> torch.Tensor:
        """The margin of `score` alone, a tensor of one number through which gradients flow."""
        margins = self._margins(logits.float(), instance)
        return sum(margins[1:], margins[0]) / len(margins)

    def _margins(self, logits: torch.Tensor, instance: Instance) -> list[torch.Tensor]:
        """One number a judged position."""
        rows = zip(logits, instance.accept, instance.wrong, strict=True)
        return [margin(row, accept, wrong, self.judge) for row, accept, wrong in rows]


def first_tokens(text: Text, answers: Iterable[Sequence[str]]) -> tuple[int, ...]:
    """The first token of every spelling of every answer, each once."""
    return tuple(dict.fromkeys(text.encode(one)[0] for answer in answers for one in answer))


def choose(rng: np.random.Generator, words: Sequence[str], k: int) -> list[str]:
    """`k` different words."""
    return [words[i] for i in rng.choice(len(words), k, replace=False)]


def names(text: Text) -> list[str]:
    """The people's names that are one token here."""
    return text.pool(lexicon.NAMES, 6, "names")
