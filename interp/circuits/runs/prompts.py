"""The prompts a circuit is looked for on: pairs, clean and corrupted, that differ in what decides
the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from interp import tasks
from interp.errors import InputError
from interp.evaluation.accuracy import sample
from interp.inputs.text import check_seed, read_file
from interp.inputs.tokenizer import Text, pad_id
from interp.support.json_text import parse
from interp.tasks.images import ImageTask
from interp.tasks.task import Instance, Problem, Task, collate

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class Pairs:
    """Prompts run together, left-padded alike.

    clean, corrupted: (batch, tokens) ids; mask (batch, tokens), 1 at real tokens; `first` is the
    slot from which logits are needed, `offset[b]` pads precede row b. `rows` are the numbers of
    these prompts among all.
    """

    clean: torch.Tensor
    corrupted: torch.Tensor
    mask: torch.Tensor
    offset: tuple[int, ...]
    instances: tuple[Instance, ...]
    rows: range
    score: Callable[[torch.Tensor, Instance], torch.Tensor]

    @property
    def first(self) -> int:
        return min(
            p + o for i, o in zip(self.instances, self.offset, strict=True) for p in i.positions
        )

    def margins(self, logits: torch.Tensor) -> torch.Tensor:
        """(batch,): how far each row of `logits` (batch, last slots, vocabulary) prefers the clean
        prompt's answer, as `Task.margin` says; gradients flow."""
        judged = zip(self.judged(logits), self.instances, strict=True)
        return torch.stack([self.score(rows, instance) for rows, instance in judged])

    def judged(self, logits: torch.Tensor) -> list[torch.Tensor]:
        """(judged positions, vocabulary) of each prompt, from `logits` (batch, last slots,
        vocabulary)."""
        start = self.mask.shape[1] - logits.shape[1]
        return [
            row[[p + offset - start for p in i.positions]]
            for row, i, offset in zip(logits, self.instances, self.offset, strict=True)
        ]

    def ends(self) -> torch.Tensor:
        """(batch,): the slot of each prompt's last judged position."""
        slots = [i.positions[-1] + o for i, o in zip(self.instances, self.offset, strict=True)]
        return torch.tensor(slots, device=self.mask.device)


@dataclass(frozen=True)
class Prompts:
    """Pairs of prompts of a task, clean and corrupted.

    `from_task`, `from_texts` and `from_file` make them.

    Example:
        >>> prompts = interp.circuits.prompts.from_task(model, "ioi", 4)
        >>> len(prompts), prompts.name
        (4, 'ioi')
    """

    task: Task
    instances: tuple[Instance, ...]
    #: on the choice of a format
    note: str | None = None

    @property
    def name(self) -> str:
        return self.task.name

    def __len__(self) -> int:
        return len(self.instances)

    def tensors(self) -> list[torch.Tensor]:
        """All ids, for the record."""
        return [torch.tensor(row) for i in self.instances for row in (i.ids, i.corrupted)]

    def recorded(self) -> list[Any]:
        """What the hash of a circuit's inputs is taken of: ids, and what the answers are."""
        return [*self.tensors(), self.instances]

    def batches(self, model: HookedModel, tokens: int) -> list[Pairs]:
        """In order, each of at most `tokens` tokens (or one row)."""
        batches, start = [], 0
        while start < len(self.instances):
            stop, width = start, 0
            while stop < len(self.instances):
                width = max(width, len(self.instances[stop].ids))
                if stop > start and width * (stop + 1 - start) > tokens:
                    break
                stop += 1
            batches.append(self._pairs(model, start, stop))
            start = stop
        return batches

    def _pairs(self, model: HookedModel, start: int, stop: int) -> Pairs:
        part = self.instances[start:stop]
        pad = pad_id(model.tokenizer)
        clean, corrupted = collate(part, pad), collate(part, pad, "corrupted")
        mask, device = clean.attention_mask, model.device
        return Pairs(
            clean.input_ids.to(device),
            corrupted.input_ids.to(device),
            mask.to(device),
            clean.offset,
            part,
            range(start, stop),
            self.task.margin,
        )


@dataclass(frozen=True)
class Written(Task):
    """Prompts that someone wrote."""

    source: str = "prompts"

    name: ClassVar[str] = "prompts"
    summary: ClassVar[str] = "prompts of one's own"
    citation: ClassVar[str] = ""

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        raise InputError("Written prompts are not drawn; make them with interp.circuits.prompts.")


def from_task(
    model: HookedModel, task: str | Task, n: int, seed: int = 0, format: str | None = None
) -> Prompts:
    """Seeded problems of a task with their corrupted twins, as `Prompts`.

    Args:
        model: the model; its tokenizer writes them.
        task: a name, or a task with settings of its own.
        n: pairs.
        seed: of the problems.
        format: of the prompts; the one that the model understands best if not given.

    Raises:
        InputError: the task has no negative examples.
        UnknownNameError, ContextError.

    Example:
        >>> len(interp.circuits.prompts.from_task(model, "ioi", 4))
        4
    """
    check_seed(seed)
    named = tasks.get(task) if isinstance(task, str) else task
    if isinstance(named, ImageTask):
        raise InputError(
            f"Circuits are looked for in text, and {named.name} is about pictures; use a task of "
            "words."
        )
    posed, instances = sample(model, task, n, seed, format=format)
    return checked(Prompts(posed.task, tuple(instances), posed.note))


def from_texts(model: HookedModel, rows: Iterable[Mapping[str, Any]]) -> Prompts:
    """Prompts of one's own, from rows of texts.

    Answers are single tokens as they follow the prompt, usually with a leading space.

    Args:
        model: the model; its tokenizer reads them.
        rows: each has `clean`, `corrupted`, `answer` and, if any, `wrong`, a text or a list.

    Raises:
        InputError: pairs of different lengths, an answer of several tokens, no corrupted prompt, no
            rows.

    Example:
        >>> row = dict(clean="the cat saw the", corrupted="the dog saw the", answer=" cat")
        >>> len(interp.circuits.prompts.from_texts(model, [row]))
        1
    """
    text = Text(model.tokenizer)
    instances = [_written(text, row, f"Prompt {n}") for n, row in enumerate(rows, 1)]
    if not instances:
        raise InputError("There are no prompts; give at least one pair, clean and corrupted.")
    return checked(Prompts(Written(), tuple(instances)))


def from_file(model: HookedModel, path: str | Path) -> Prompts:
    """Prompts of one's own, from a file: `from_texts` of JSON, or of an object a line.

    Args:
        model: the model; its tokenizer reads them.
        path: a list of objects in JSON, or one object a line.

    Raises:
        InputError: a file that can't be read, or as `from_texts`.

    Example:
        >>> import json
        >>> row = dict(clean="the cat saw the", corrupted="the dog saw the", answer=" cat")
        >>> with open("prompts.json", "w") as file:
        ...     json.dump([row], file)
        >>> len(interp.circuits.prompts.from_file(model, "prompts.json"))
        1
    """
    return from_texts(model, read(path))


def read(path: str | Path) -> list[Any]:
    """The rows of a prompt file, not looked into yet. Raises `InputError`."""
    text, where = read_file(path, "prompt"), ""
    try:
        if text.lstrip().startswith("["):
            return list(parse(text))
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            where = f", line {number},"
            if line.strip():
                rows.append(parse(line))
        return rows
    except json.JSONDecodeError as error:
        raise InputError(
            f"The prompt file {path}{where} is not JSON, a list of objects or one a line "
            f"({error.msg})."
        ) from error


def _written(text: Text, row: Any, what: str) -> Instance:
    if (
        not isinstance(row, Mapping)
        or not isinstance(row.get("clean"), str)
        or not isinstance(row.get("answer"), str)
    ):
        raise InputError(f'{what} is not an object with texts "clean", "corrupted" and "answer".')
    if not isinstance(row.get("corrupted"), str):
        raise InputError(
            f'{what} has no negative example: give it a text "corrupted", in which the answer '
            "isn't determined."
        )
    wrong = row.get("wrong") or []
    wrong = [wrong] if isinstance(wrong, str) else wrong
    if not isinstance(wrong, Sequence) or not all(isinstance(w, str) for w in wrong):
        raise InputError(
            f'{what} has {row["wrong"]!r} for "wrong", which is a text or a list of texts.'
        )
    if row["answer"] in wrong:
        raise InputError(
            f"{what} has its answer {row['answer']!r} among the wrong ones; take it out there."
        )
    problem = Problem(row["clean"], row["corrupted"], row["answer"], tuple(wrong))
    ids, corrupted = text.prompt(problem.clean), text.prompt(problem.corrupted)
    if not ids:
        raise InputError(f"{what} is empty; write a text that the answer follows.")
    if len(ids) != len(corrupted):
        raise InputError(
            f"{what} has {len(ids)} tokens and its corrupted twin {len(corrupted)}; patching needs "
            "pairs of one "
            "length, so reword one of them."
        )
    for answer in (problem.answer, *problem.wrong):
        if len(_ids(text, answer)) != 1:
            raise InputError(
                f"The answer {answer!r} of {what[0].lower()}{what[1:]} is "
                f"{len(_ids(text, answer))} tokens and must "
                "be one (often with a leading space); choose another word."
            )
    accept = (tuple(_ids(text, problem.answer)),)
    return Instance(
        tuple(ids),
        (len(ids) - 1,),
        accept,
        (tuple(_ids(text, w)[0] for w in problem.wrong),),
        tuple(corrupted),
    )


def checked(prompts: Prompts) -> Prompts:
    """The same. Raises `InputError` where a pair has two lengths, or no pair differs."""
    for number, i in enumerate(prompts.instances, 1):
        if len(i.ids) != len(i.corrupted):
            raise InputError(
                f"Prompt {number} of {prompts.name} has {len(i.ids)} tokens and its corrupted twin "
                f"{len(i.corrupted)}; "
                "patching needs pairs of one length."
            )
    if all(i.ids == i.corrupted for i in prompts.instances):
        raise InputError(
            f"The task {prompts.name} has no negative examples (its corrupted prompts are the "
            "clean ones), so no "
            "circuit can be told from it; choose another task, or write prompts of your own."
        )
    return prompts


def _ids(text: Text, answer: str) -> list[int]:
    """An answer's tokens as they stand in a text; or as they stand alone, where a word was written
    as a tokenizer that puts a space before every text decodes it."""
    ids = text.encode(answer)
    return ids if len(ids) == 1 else text.plain(answer)
