"""How a problem is put to a model: the formats of prompts.

`bare` is the text alone; `lead` also begins the answer's sentence, so that only the answer is left
to say; `few-shot` puts solved problems before it; `chat` is a user's turn in the tokenizer's own
template. The needle task has a fifth, `paper` (`interp.tasks.niah`). Which one a model understands
is found out by trying (`interp.tasks.posing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.errors import InputError
from interp.inputs.tokenizer import Text

#: all formats; where several do as well, the earlier is taken
ORDER = ("bare", "lead", "few-shot", "chat", "paper")
#: solved problems of `few-shot`
SHOTS = 4


@dataclass(frozen=True)
class Problem:
    """A composed problem in text form: what `Task.compose` gives for the single-answer tasks.

    Attributes:
        clean, corrupted: the bare prompts.
        answer, wrong: what follows, right and wrong, with the space before them.
        info: what a score or a plot needs.
        lead: the beginning of an answer in a sentence, where the task has one.
        corrupted_lead: the same of the corrupted prompt.
        ask: what a user would say before the prompt.
    """

    clean: str
    corrupted: str
    answer: str
    wrong: tuple[str, ...]
    info: Mapping[str, Any] = field(default_factory=dict)
    lead: str = ""
    corrupted_lead: str = ""
    ask: str = "Continue the text with the next word alone."


@dataclass(frozen=True)
class Wording:
    """A problem as it is put to a model: token ids of both prompts, and the spellings of each right
    or wrong answer."""

    clean: list[int]
    corrupted: list[int]
    answer: tuple[str, ...]
    wrong: tuple[tuple[str, ...], ...]


def worded(text: Text, format: str, problem: Problem, shots: Sequence[Problem] = ()) -> Wording:
    """The problem in this format; `shots` are what `few-shot` shows solved."""
    return _WORDED[format](text, problem, shots)


def _bare(text: Text, problem: Problem, shots: Sequence[Problem]) -> Wording:
    return _after(text, problem, "", "", "")


def _lead(text: Text, problem: Problem, shots: Sequence[Problem]) -> Wording:
    return _after(text, problem, "", problem.lead, problem.corrupted_lead)


def _few_shot(text: Text, problem: Problem, shots: Sequence[Problem]) -> Wording:
    shown = "".join(f"{s.clean}{s.answer}.\n\n" for s in shots)
    return _after(text, problem, shown, "", "")


def _after(text: Text, problem: Problem, shown: str, lead: str, corrupted_lead: str) -> Wording:
    return Wording(
        text.prompt(shown + problem.clean + lead),
        text.prompt(shown + problem.corrupted + corrupted_lead),
        (problem.answer,),
        tuple((w,) for w in problem.wrong),
    )


def _chat(text: Text, problem: Problem, shots: Sequence[Problem]) -> Wording:
    """A user's turn; an answer may begin a sentence (no space before it, a capital letter)."""
    before, after = text.around_user()

    def turn(prompt: str, lead: str) -> list[int]:
        said = f"{before}{problem.ask}\n\n{prompt}{after}{lead.strip()}"
        return text.plain(said)

    spelled = spellings if not problem.lead else lambda answer: (answer,)
    return Wording(
        turn(problem.clean, problem.lead),
        turn(problem.corrupted, problem.corrupted_lead),
        spelled(problem.answer),
        tuple(spelled(w) for w in problem.wrong),
    )


def spellings(answer: str) -> tuple[str, ...]:
    """The answer with and without the space before it, and with a capital letter."""
    word = answer.strip()
    capital = word[:1].upper() + word[1:]
    return tuple(dict.fromkeys((answer, word, capital, f" {capital}")))


_WORDED: dict[str, Callable[[Text, Problem, Sequence[Problem]], Wording]] = {
    "bare": _bare,
    "lead": _lead,
    "few-shot": _few_shot,
    "chat": _chat,
}


def check_format(name: str, format: str, formats: Sequence[str]) -> None:
    """Raise `InputError` for a format that the task called `name` does not have."""
    if format not in formats:
        known = ", ".join(formats)
        raise InputError(f"The task {name} has no format {format!r}; it has {known}.")
