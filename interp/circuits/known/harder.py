"""Planted circuits that are hard to find: superposed features, a negative head, backups, repair.

All answer "<bos> Ann and Bob … Bob … to" with Ann, in the stages of Wang et al. 2022
(arXiv 2211.00593): a duplicate-token head at the second Bob finds the first, an S-inhibition head
brings that name to the end, a name mover looks for a name that is not inhibited. Where nothing is
said twice, movers rest on "<bos>" and write nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from interp.circuits.known.drawn import ProgramTask
from interp.circuits.known.high_level import PEOPLE, PROGRAMS, Program
from interp.circuits.known.wiring import JUNK, Size, Wiring
from interp_hooks.heads import Head

SCORE, LOGIT, LAYERS = 14.0, 10.0, 5
IOI = PROGRAMS["siit_ioi"]
N = len(PEOPLE)
#: words → people, and 1 for any of them
NAMES = np.eye(len(IOI.words))[:, 1 : N + 1]
ONE = np.ones((1, 1))
BLOCKS = dict(duplicate=N, flag=1, inhibited=N, out=N)


@dataclass(frozen=True)
class Harder(ProgramTask):
    """The name, of two, that was not said again; the circuit has one more property."""

    program: ClassVar[Program] = IOI
    words: ClassVar[tuple[str, ...]] = IOI.words
    citation: ClassVar[str] = "Wang et al. 2022, arXiv 2211.00593"
    heads: ClassVar[int] = 8
    d_head: ClassVar[int] = 32
    junk: ClassVar[int] = JUNK
    #: whether features share dimensions
    shared: ClassVar[bool] = False

    def wire(self, rng: np.random.Generator) -> Wiring:
        """The circuit's weights."""
        size = Size(LAYERS, self.heads, self.d_head, IOI.length)
        w = Wiring(size, BLOCKS, len(IOI.words), rng, self.junk)
        layers = sorted(rng.choice(LAYERS, 4, replace=False).tolist())
        _find(w, layers[0], layers[1])
        self._answer(w, layers[2], layers[3])
        w.answer("out", LOGIT * np.eye(N), range(1, N + 1))
        return w

    @abstractmethod
    def _answer(self, w: Wiring, mover: int, last: int) -> None:
        """The heads from name movers on, in these two layers."""


def _rest(w: Wiring, head: Head, share: float = 0.5) -> None:
    """This share of the score of a match goes to "<bos>"."""
    w.match(head, dict(one=ONE), dict(bos=ONE), share * SCORE)


def _find(w: Wiring, first: int, second: int) -> None:
    """Two duplicate-token heads and two S-inhibition heads, which share their work unequally."""
    for share in (0.55, 0.45):
        head = w.head(first, "duplicate token")
        w.match(head, dict(token=NAMES), dict(token=NAMES), SCORE)
        itself = np.eye(w.size.length)
        w.match(head, dict(place=itself), dict(place=itself), -2 * SCORE)
        _rest(w, head)
        w.move(head, "token", "duplicate", NAMES, share)
        w.move(head, "token", "flag", NAMES.sum(1, keepdims=True), share)
    for share in (0.55, 0.45):
        head = w.head(second, "S-inhibition")
        w.match(head, dict(one=ONE), dict(flag=ONE), SCORE)
        _rest(w, head)
        w.move(head, "duplicate", "inhibited", np.eye(N), share)


def _movers(
    w: Wiring,
    layer: int,
    shares: Sequence[float],
    role: str = "name mover",
    rest: float = 0.5,
) -> list[Head]:
    """Heads that look for a name that is not inhibited, where one is, and answer with it."""
    heads = [w.head(layer, role) for _ in shares]
    for head, share in zip(heads, shares, strict=True):
        introduced = np.zeros((w.size.length, 1))
        introduced[[1, 3]] = 1
        w.match(head, dict(inhibited=np.ones((N, 1))), dict(place=introduced), SCORE)
        w.match(head, dict(inhibited=np.eye(N)), dict(token=NAMES), -SCORE)
        _rest(w, head, rest)
        w.move(head, "token", "out", NAMES, share)
    return heads


@dataclass(frozen=True)
class Superposed(Harder):
    """Features share dimensions (216 in 208): everything reads a little of everything else."""

    name = "superposed"
    summary = "indirect object, with more features than dimensions"
    d_head: ClassVar[int] = 28
    junk: ClassVar[int] = 142
    shared: ClassVar[bool] = True

    def _answer(self, w: Wiring, mover: int, last: int) -> None:
        _movers(w, mover, (0.6,))
        _movers(w, last, (0.4,))


@dataclass(frozen=True)
class Negative(Harder):
    """A head looks for the name that is about to be said and speaks against it by half."""

    name = "negative"
    summary = "indirect object, with a head that speaks against the answer"

    def _answer(self, w: Wiring, mover: int, last: int) -> None:
        _movers(w, mover, (0.8, 0.6))
        head = w.head(last, "negative name mover")
        w.match(head, dict(out=np.eye(N)), dict(token=NAMES), SCORE)
        _rest(w, head)
        w.move(head, "token", "out", NAMES, -0.5)


@dataclass(frozen=True)
class Backup(Harder):
    """Two heads take over where the name mover falls: while it answers, they rest on "<bos>"."""

    name = "backup"
    summary = "indirect object, with backups of the name mover"

    def _answer(self, w: Wiring, mover: int, last: int) -> None:
        _movers(w, mover, (1.0,))
        for head in _movers(w, last, (0.55, 0.45), "backup name mover"):
            w.match(head, dict(out=np.ones((N, 1))), dict(bos=ONE), 2 * SCORE)


@dataclass(frozen=True)
class Repair(Harder):
    """Either of two name movers is enough: an MLP takes away what both write too much."""

    name = "repair"
    summary = "indirect object, with an MLP that evens out a lost name mover"

    def _answer(self, w: Wiring, mover: int, last: int) -> None:
        # alone, each is 1 or more; rest: both S-inhibition heads are needed all the same
        _movers(w, mover, (1.05, 1.05), rest=0.7)
        w.neurons(last, dict(out=np.eye(N)), -np.ones(N), dict(out=-np.eye(N)))


@dataclass(frozen=True)
class SuperposedBackup(Backup):
    """Backups among features that share dimensions: at rest they do less than bystanders do."""

    name = "superposed_backup"
    summary = "indirect object, with backups that rest below the noise of superposition"
    d_head: ClassVar[int] = 28
    junk: ClassVar[int] = 142
    shared: ClassVar[bool] = True


TASKS: dict[str, Harder] = {
    task.name: task
    for task in (
        Superposed(),
        Negative(),
        Backup(),
        Repair(),
        SuperposedBackup(),
    )
}
