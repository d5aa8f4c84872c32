"""Small programs with named variables, and where a trained model is to keep each: what interchange
interventions compare a model with.

A variable is a function of the tokens and of earlier variables. Interchange: a base prompt is
answered with some variables taken from a source prompt; a model realises the program where swapping
the nodes aligned with them gives the same answers (Geiger et al. 2021, arXiv 2106.02997).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Program(ABC):
    """A program over prompts of one length; the answer comes at the last position.

    Attributes:
        name: of the program.
        summary: what it does, half a sentence.
        words: the vocabulary, "<bos>" first.
        length: tokens of a prompt, BOS included.
        n_layers: of the model that is trained for it; 4 heads a layer.
        nodes: variable → the head or MLP that keeps it; in order of computation.
        roles: variable → what its head is called.
        edges: (sender, receiver, part) along which what differs between prompts flows.
        constant_edges: edges whose content is the same in every prompt (places).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    words: ClassVar[tuple[str, ...]]
    length: ClassVar[int]
    n_layers: ClassVar[int]
    nodes: ClassVar[Mapping[str, str]]
    roles: ClassVar[Mapping[str, str]]
    edges: ClassVar[tuple[tuple[str, str, str], ...]]
    constant_edges: ClassVar[tuple[tuple[str, str, str], ...]]

    @abstractmethod
    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n, length) token ids."""

    def asked(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n, length): prompts with one answer, those that a task asks."""
        return self.sample(n, rng)

    @abstractmethod
    def values(self, ids: np.ndarray, given: Values | None = None) -> dict[str, np.ndarray]:
        """Every variable of these prompts, where those `given` are taken as they are; the last,
        "answer", is (n, vocabulary) probabilities."""

    def corrupted(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(n, length): prompts with another answer, of the same form."""
        found, answer = self.sample(len(ids), rng), self.values(ids)["answer"].argmax(1)
        while len(same := np.flatnonzero(self.values(found)["answer"].argmax(1) == answer)):
            found[same] = self.sample(len(same), rng)
        return found

    @abstractmethod
    def rivals(self, ids: np.ndarray) -> np.ndarray:
        """(n, vocabulary) bool: the wrong answers that the right one is compared with."""

    def _one_hot(self, token: np.ndarray) -> np.ndarray:
        return np.eye(len(self.words))[token]


PEOPLE = ("Ann", "Bob", "Cat", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Joe", "Kim", "Leo")
FILLERS = ("then", "there", "met", "gave", "wine", "today")


class IndirectObject(Program):
    """ "<bos> Ann and Bob . . Bob . . to" → Ann: the name of two that was not said again.

    duplicate (at every position): whether the name there was the first or the second of the two;
    inhibited: which of the two was said again, 0 for none; answer: the other one, either where none
    was.
    """

    name = "siit_ioi"
    summary = "the name, of two, that was not said again"
    words = ("<bos>", *PEOPLE, "and", "to", *FILLERS)
    length = 10
    n_layers = 3
    nodes = {"duplicate": "L0H1", "inhibited": "L1H2", "answer": "L2H0"}
    roles = {"duplicate": "duplicate token", "inhibited": "S-inhibition", "answer": "name mover"}
    edges = (
        ("input", "L0H1", "q"),
        ("input", "L0H1", "k"),
        ("L0H1", "L1H2", "k"),
        ("L0H1", "L1H2", "v"),
        ("L1H2", "L2H0", "q"),
        ("input", "L2H0", "v"),
        ("L2H0", "output", ""),
    )
    constant_edges = (
        ("input", "L0H1", "v"),
        ("input", "L1H2", "q"),
        ("input", "L1H2", "k"),
        ("input", "L2H0", "q"),
        ("input", "L2H0", "k"),
    )
    #: where the two names stand, and where the second mention may
    first, second, later = 1, 3, (5, 6, 7, 8)

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        ids = self._frame(n, rng)
        who = rng.choice(3, n, p=(0.4, 0.4, 0.2))
        return self._said(ids, who, rng)

    def corrupted(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Three other names, none said twice: nothing is determined (ABC, in Wang et al.)."""
        found = self._said(self._frame(len(ids), rng), np.full(len(ids), 2), rng)
        theirs = ids[:, None, [self.first, self.second]]
        while True:
            new = found[:, [self.first, self.second]]
            same = np.flatnonzero((new[:, :, None] == theirs).any((1, 2)))
            if not len(same):
                return found
            again = self._frame(len(same), rng)
            found[same] = self._said(again, np.full(len(same), 2), rng)

    def asked(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """One of the two is always said again."""
        return self._said(self._frame(n, rng), rng.choice(2, n), rng)

    def _frame(self, n: int, rng: np.random.Generator) -> np.ndarray:
        ids = np.zeros((n, self.length), dtype=np.int64)
        ids[:, 4:] = rng.choice(np.arange(len(PEOPLE) + 3, len(self.words)), (n, self.length - 4))
        ids[:, 2], ids[:, -1] = self.words.index("and"), self.words.index("to")
        return ids

    def _said(self, ids: np.ndarray, who: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Three different names a row, of which the first two are introduced and `who` is said."""
        three = np.argsort(rng.random((len(ids), len(PEOPLE))), 1)[:, :3] + 1
        rows = np.arange(len(ids))
        ids[:, self.first], ids[:, self.second] = three[:, 0], three[:, 1]
        ids[rows, rng.choice(self.later, len(ids))] = three[rows, who]
        return ids

    def values(self, ids: np.ndarray, given: Values | None = None) -> dict[str, np.ndarray]:
        given = given or {}
        names = ids[:, [self.first]], ids[:, [self.second]]
        duplicate = np.where(ids == names[0], 1, np.where(ids == names[1], 2, 0))
        duplicate[:, :5] = 0
        duplicate = given.get("duplicate", duplicate)
        inhibited = given.get("inhibited", duplicate.max(1))
        both = [self._one_hot(name[:, 0]) for name in names]
        share = (np.arange(3) == inhibited[:, None]).astype(float)  # of none, the first, the second
        answer = (share[:, 2:] + share[:, :1] / 2) * both[0] + (
            share[:, 1:2] + share[:, :1] / 2
        ) * both[1]
        return dict(duplicate=duplicate, inhibited=inhibited, answer=given.get("answer", answer))

    def rivals(self, ids: np.ndarray) -> np.ndarray:
        two = self._one_hot(ids[:, self.first]) + self._one_hot(ids[:, self.second])
        return (two > 0) & (self.values(ids)["answer"] < 0.5)


DIGITS = ("zero", "one", "two", "three", "four")
LETTERS = ("a", "b", "c", "d", "e", "f", "g", "h")


class Pointer(Program):
    """ "<bos> i j t0 t1 t2 t3 t4 =" → t at (i + j) mod 5.

    first = i and second = j, brought to the last position by two heads of one layer; sum, their sum
    mod 5, made by an MLP; answer: the letter at that place of the table.
    """

    name = "siit_pointer"
    summary = "the letter of a table at the sum of two digits"
    words = ("<bos>", *DIGITS, *LETTERS, "=")
    length = 9
    n_layers = 2
    nodes = {"first": "L0H1", "second": "L0H3", "sum": "MLP 0", "answer": "L1H2"}
    roles = {"first": "operand", "second": "operand", "answer": "look-up"}
    edges = (
        ("input", "L0H1", "v"),
        ("input", "L0H3", "v"),
        ("L0H1", "MLP 0", ""),
        ("L0H3", "MLP 0", ""),
        ("MLP 0", "L1H2", "q"),
        ("input", "L1H2", "v"),
        ("L1H2", "output", ""),
    )
    constant_edges = (
        ("input", "L0H1", "q"),
        ("input", "L0H1", "k"),
        ("input", "L0H3", "q"),
        ("input", "L0H3", "k"),
        ("input", "MLP 0", ""),
        ("input", "L1H2", "q"),
        ("input", "L1H2", "k"),
    )

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        ids = np.zeros((n, self.length), dtype=np.int64)
        ids[:, 1:3] = rng.integers(1, 6, (n, 2))
        ids[:, 3:8] = np.argsort(rng.random((n, len(LETTERS))), 1)[:, :5] + 6
        ids[:, -1] = self.words.index("=")
        return ids

    def values(self, ids: np.ndarray, given: Values | None = None) -> dict[str, np.ndarray]:
        given = given or {}
        first = given.get("first", ids[:, 1] - 1)
        second = given.get("second", ids[:, 2] - 1)
        total = given.get("sum", (first + second) % 5)
        token = ids[np.arange(len(ids)), 3 + total]
        answer = given.get("answer", self._one_hot(token))
        return dict(first=first, second=second, sum=total, answer=answer)

    def rivals(self, ids: np.ndarray) -> np.ndarray:
        table = self._one_hot(ids[:, 3:8]).sum(1)
        return (table > 0) & (self.values(ids)["answer"] < 0.5)


class Induction(Program):
    """ "<bos>", eight letters in some order, one of them again → the letter that followed it.

    previous (at every position): the token before; answer: the letter whose `previous` is the last
    token.
    """

    name = "siit_induction"
    summary = "the letter that followed the last one before"
    words = ("<bos>", *LETTERS)
    length = 10
    n_layers = 2
    nodes = {"previous": "L0H2", "answer": "L1H1"}
    roles = {"previous": "previous token", "answer": "induction"}
    edges = (
        ("input", "L0H2", "v"),
        ("L0H2", "L1H1", "k"),
        ("input", "L1H1", "q"),
        ("input", "L1H1", "v"),
        ("L1H1", "output", ""),
    )
    constant_edges = (("input", "L0H2", "q"), ("input", "L0H2", "k"), ("input", "L1H1", "k"))

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        letters = np.argsort(rng.random((n, len(LETTERS))), 1) + 1
        again = letters[np.arange(n), rng.integers(0, len(LETTERS) - 1, n)]
        return np.concatenate([np.zeros((n, 1), np.int64), letters, again[:, None]], 1)

    def values(self, ids: np.ndarray, given: Values | None = None) -> dict[str, np.ndarray]:
        given = given or {}
        previous = given.get("previous", np.roll(ids, 1, 1))
        # every letter is once among positions 2 to 9 of `previous`, also of a source
        at = (previous[:, 2:] == ids[:, -1:]).argmax(1) + 2
        answer = given.get("answer", self._one_hot(ids[np.arange(len(ids)), at]))
        return dict(previous=previous, answer=answer)

    def rivals(self, ids: np.ndarray) -> np.ndarray:
        rivals = self.values(ids)["answer"] < 0.5
        rivals[:, 0] = False
        return rivals


PROGRAMS: Mapping[str, Program] = {p.name: p for p in (IndirectObject(), Pointer(), Induction())}
