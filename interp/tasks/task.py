"""What a task is: seeded prompts with known answers, for any tokenizer.

An `Instance` is a token sequence, the positions whose logits are judged, and which tokens are right
or wrong there. Several-token answers are teacher forced: a greedy decode is exact if and only if
the arg-max is right at every forced position, so one definition serves one forward pass and
step-by-step decoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from interp.errors import InputError
from interp.tasks import lexicon

if TYPE_CHECKING:
    import torch

Judge = Literal["top1", "choice", "mass", "exact"]


@dataclass(frozen=True)
class Instance:
    """One problem, as token ids.

    `ids` is the prompt followed, for answers of several tokens, by all but the last answer token;
    the logits at `positions[i]` should predict a token of `accept[i]` rather than one of
    `wrong[i]`. `corrupted` has the same length and calls for another answer. `info` holds what a
    score or a plot needs (spans, names).
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
    """Left-padded instances: `input_ids`, `attention_mask` (batch, tokens); `offset[b]` pads
    precede row b."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    offset: tuple[int, ...]
    instances: tuple[Instance, ...]


def collate(instances: Sequence[Instance], pad_id: int, which: str = "ids") -> Batch:
    """Left-pad `instances` into one batch; `which` is "ids", "corrupted" or "prompt"."""
    import torch

    rows = [getattr(i, which) for i in instances]
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = torch.tensor(row)
        mask[b, width - len(row) :] = 1
    return Batch(ids, mask, tuple(width - len(r) for r in rows), tuple(instances))


class Text:
    """A tokenizer with what the tasks need: plain encoding, BOS, and single-token word pools."""

    def __init__(self, tokenizer: Any):
        if tokenizer is None:
            raise InputError(
                "This task needs a tokenizer and the model has none; pass tokenizer= when loading "
                "it."
            )
        self.tokenizer = tokenizer
        self._pools: dict[tuple[str, ...], list[str]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def prompt(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes a prompt: with BOS where its own default has one."""
        return list(self.tokenizer.encode(text, verbose=False))

    @property
    def bos(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text (often one BOS, sometimes
        none)."""
        with_special, plain = self.prompt("a"), self.encode("a")
        return (
            with_special[: max(0, with_special.index(plain[0]))]
            if plain and plain[0] in with_special
            else []
        )

    def pool(self, words: Sequence[str], at_least: int = 2, what: str = "words") -> list[str]:
        """The words that are one token (with a leading space). Raises `InputError` if too few
        are."""
        key = tuple(words)
        if key not in self._pools:
            unknown = getattr(
                self.tokenizer, "unk_token_id", None
            )  # one token too, the same for all words
            self._pools[key] = [
                w for w in key if len(ids := self.encode(" " + w)) == 1 and ids[0] != unknown
            ]
        kept = self._pools[key]
        if len(kept) < at_least:
            raise InputError(
                f"Only {len(kept)} of the {len(words)} {what} of this task are single tokens for "
                "this tokenizer "
                f"(it needs {at_least}); choose another task or model."
            )
        return kept

    def one(self, word: str) -> int:
        """The id of a single-token word."""
        return self.encode(" " + word)[0]

    def vocabulary(self) -> np.ndarray:
        """Ids of all ordinary tokens (no special, no added tokens), sorted."""
        special = set(self.tokenizer.all_special_ids) | set(
            getattr(self.tokenizer, "added_tokens_decoder", {})
        )
        return np.array(sorted(i for i in self.tokenizer.get_vocab().values() if i not in special))


@dataclass(frozen=True)
class Problem:
    """A composed problem in text form: what `Task.compose` gives for the single-answer tasks."""

    clean: str
    corrupted: str
    answer: str
    wrong: tuple[str, ...]
    info: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A generator of problems. Subclasses set `name`, `summary`, `citation`, `judge` and write
    `instance`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str]
    judge: ClassVar[Judge] = "top1"
    #: expected accuracy of guessing, for plots; None where it is about zero
    chance: ClassVar[float] = 0.0

    @abstractmethod
    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        """One problem for this tokenizer."""

    def sample(self, tokenizer: Any, n: int, seed: int = 0) -> list[Instance]:
        """`n` seeded problems; the i-th depends on (seed, i) alone, so longer samples extend
        shorter ones."""
        text = Text(tokenizer)
        return [self.instance(text, np.random.default_rng([seed, i])) for i in range(n)]

    def document(self, text: Text, rng: np.random.Generator) -> str:
        """A solved problem as training text."""
        problem = self.compose(text, rng)
        return f"{problem.clean}{problem.answer}."

    def compose(self, text: Text, rng: np.random.Generator) -> Problem:
        """The problem as text (tasks made of tokens rather than words have none)."""
        raise InputError(f"The task {self.name} has no text form.")

    def _from_problem(self, text: Text, problem: Problem) -> Instance:
        ids, corrupted = text.prompt(problem.clean), text.prompt(problem.corrupted)
        if len(ids) != len(corrupted):
            raise InputError(
                f"The task {self.name} got prompts of different lengths from this tokenizer "
                f"({len(ids)} and {len(corrupted)} tokens); choose another task."
            )
        accept = (tuple(text.encode(problem.answer)[:1]),)
        wrong = (tuple(text.encode(w)[0] for w in problem.wrong),)
        return Instance(
            tuple(ids), (len(ids) - 1,), accept, wrong, tuple(corrupted), dict(problem.info)
        )

    def score(self, logits: torch.Tensor, instance: Instance) -> tuple[float, float]:
        """(correct, margin) from `logits` (judged positions, vocabulary) of one instance.

        correct: "top1": share of positions whose arg-max is accepted; "exact": 1 if all are;
        "choice": arg-max among accepted and wrong tokens only; "mass": 1 if the accepted tokens'
        probability exceeds the wrong ones'. margin: for "mass" the difference of the two
        probabilities, in [−1, 1]; else the mean over positions of the accepted logit minus the mean
        wrong logit (log-probability where there is no wrong token), in nats.
        """
        logits = logits.float()
        margins = self._margins(logits, instance)
        hits = []
        for row, accept, wrong, found in zip(
            logits, instance.accept, instance.wrong, margins, strict=True
        ):
            if self.judge == "mass":
                hits.append(bool(found > 0))
                continue
            rivals = row[list(wrong)] if self.judge == "choice" else row
            hits.append(bool(row[list(accept)].max() >= rivals.max()) if len(rivals) else True)
        correct = float(all(hits)) if self.judge == "exact" else float(np.mean(hits))
        return correct, float(np.mean([float(m) for m in margins]))

    def margin(self, logits: torch.Tensor, instance: Instance) -> torch.Tensor:
        """The margin of `score` alone, a tensor of one number through which gradients flow."""
        margins = self._margins(logits.float(), instance)
        return sum(margins[1:], margins[0]) / len(margins)

    def _margins(self, logits: torch.Tensor, instance: Instance) -> list[torch.Tensor]:
        """One number a judged position."""
        rows = zip(logits, instance.accept, instance.wrong, strict=True)
        return [margin(row, accept, wrong, self.judge) for row, accept, wrong in rows]


def margin(
    row: torch.Tensor, accept: Sequence[int], wrong: Sequence[int], judge: Judge
) -> torch.Tensor:
    """How far the logits `row` (vocabulary,) prefer the accepted tokens, see `Task.score`; a tensor
    of one number."""
    import torch

    good, bad = row[list(accept)], row[list(wrong)]
    if judge == "mass":
        p = torch.softmax(row, -1)
        return p[list(accept)].sum() - p[list(wrong)].sum()
    return good.max() - (bad.mean() if len(wrong) else torch.logsumexp(row, -1))


def choose(rng: np.random.Generator, words: Sequence[str], k: int) -> list[str]:
    """`k` different words."""
    return [words[i] for i in rng.choice(len(words), k, replace=False)]


def names(text: Text) -> list[str]:
    """The people's names that are one token here."""
    return text.pool(lexicon.NAMES, 6, "names")
