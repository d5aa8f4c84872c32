"""Programs compiled into a GPT-2: reverse, which of two is more frequent, sort, who led most often.

After Tracr (Lindner et al. 2023, arXiv 2301.05062), whose programs are those of RASP (Weiss et al.
2021): a head selects positions and takes the mean of what is there, an MLP maps features to
features. Written anew for a causal, stock GPT-2, and beside the program's heads stand others that
attend and write as strongly and are never read to any effect (`wiring`).

Selection is by softmax with a score of `SCORE`, sharp but not saturated: gradients see the edges,
and what is selected is exact to about e^-SCORE.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from interp.circuits.known.drawn import Answer, DrawnTask
from interp.circuits.known.wiring import Size, Wiring

SCORE = 12.0
LETTERS = tuple("abcdefghijklmnop")
LAYERS, HEADS, D_HEAD = 4, 8, 32
#: logit of a right token, or of half of it where row and column are answered apart
LOGIT = 10.0


def _size(length: int) -> Size:
    return Size(LAYERS, HEADS, D_HEAD, length)


def _stages(rng: np.random.Generator) -> tuple[int, int]:
    """Two layers, one after the other."""
    first, second = sorted(rng.choice(LAYERS, 2, replace=False).tolist())
    return first, second


def _one(n: int, *which: int) -> np.ndarray:
    """(n, 1): 1 at these features."""
    found = np.zeros((n, 1))
    found[list(which)] = 1
    return found


def _letters(wiring: Wiring, first: int) -> dict[str, np.ndarray]:
    """The maps from words to a letter's row and to its column of four, letters being words from
    `first` on; the answer is read from both."""
    rows, columns = np.zeros((2, wiring.vocabulary, 4))
    index = np.arange(len(LETTERS))
    rows[first + index, index // 4] = 1
    columns[first + index, index % 4] = 1
    words = (first + index).tolist()
    wiring.answer("row", LOGIT * rows[words].T, words)
    wiring.answer("column", LOGIT * columns[words].T, words)
    return dict(row=rows, column=columns)


@dataclass(frozen=True)
class Reverse(DrawnTask):
    """ "<bos> x1 … xn | xn …" → the letters before the bar, backwards; the last three are judged.

    n is 5, 6 or 7 and the length is always 11.
    """

    name = "reverse"
    summary = "letters backwards, after a bar"
    citation = "Lindner et al. 2023, arXiv 2301.05062"
    words = ("<bos>", *LETTERS, "|")
    length, judged = 11, (8, 9, 10)

    def draw(self, rng: np.random.Generator) -> list[int]:
        n = int(rng.integers(5, 8))
        letters = (1 + rng.integers(len(LETTERS), size=n)).tolist()
        return [0, *letters, self.words.index("|"), *letters[::-1]][: self.length]

    def solve(self, ids: list[int]) -> dict[int, Answer]:
        letters = ids[1 : ids.index(self.words.index("|"))]
        backwards = letters[::-1]
        found: dict[int, Answer] = {}
        for p in self.judged:
            right = backwards[p - len(letters) - 1]
            found[p] = right, tuple(i for i in range(1, 17) if i != right)
        return found

    def wire(self, rng: np.random.Generator) -> Wiring:
        """A head finds the bar; an MLP works out from where it stands which letter is next; two
        heads look there and bring its row and its column."""
        T, V = self.length, len(self.words)
        w = Wiring(_size(T), dict(bar=T, target=T, row=4, column=4), V, rng)
        first, second = _stages(rng)
        bar = w.head(first, "separator")
        key = dict(token=2 * _one(V, self.words.index("|")), bos=_one(1, 0))
        w.match(bar, dict(one=_one(1, 0)), key, SCORE)
        w.move(bar, "place", "bar", np.eye(T))
        pairs = [(s, p) for s in (6, 7, 8) for p in range(s, T) if 2 * s - 1 - p >= 1]
        s, p = np.array(pairs).T
        reads = dict(bar=np.eye(T)[:, s], place=np.eye(T)[:, p])
        w.neurons(first, reads, -np.ones(len(pairs)), dict(target=np.eye(T)[2 * s - 1 - p]))
        for block, mapped in _letters(w, 1).items():
            head = w.head(second, "copy")
            w.match(head, dict(target=np.eye(T)), dict(place=np.eye(T)), SCORE)
            w.match(head, dict(one=_one(1, 0)), dict(bos=_one(1, 0)), SCORE / 2)
            w.move(head, "token", block, mapped)
        return w


@dataclass(frozen=True)
class Frequent(DrawnTask):
    """ "<bos> …9 letters… a b ?" → a or b, whichever occurs more often."""

    name = "histogram"
    summary = "which of the last two letters occurred more often"
    citation = "Lindner et al. 2023, arXiv 2301.05062 (hist)"
    words = ("<bos>", *LETTERS[:6], "?")
    length = 13

    def draw(self, rng: np.random.Generator) -> list[int]:
        while True:
            letters = (1 + rng.integers(6, size=9)).tolist()
            a, b = (1 + rng.choice(6, 2, replace=False)).tolist()
            counts = letters.count(a), letters.count(b)
            if counts[0] != counts[1] and max(counts) <= 4:
                return [0, *letters, a, b, 7]

    def solve(self, ids: list[int]) -> dict[int, Answer]:
        counts = Counter(ids)
        a, b = ids[-3], ids[-2]
        right, wrong = (a, b) if counts[a] > counts[b] else (b, a)
        return {self.length - 1: (right, (wrong,))}

    def wire(self, rng: np.random.Generator) -> Wiring:
        """Two heads bring the two letters to the end; two count them there, each by looking evenly
        at "<bos>" and at every place with its letter; an MLP compares the shares of "<bos>"."""
        T, V = self.length, len(self.words)
        w = Wiring(_size(T), dict(a=6, b=6, share_a=1, share_b=1, out=6), V, rng)
        first, second = _stages(rng)
        letter = np.eye(V)[:, 1:7]
        padded = np.hstack([letter, _one(V)])  # the last feature of a match is "<bos>"
        for back, block in ((2, "a"), (1, "b")):
            head = w.head(first, "bring")
            w.match(head, dict(place=np.eye(T)), dict(place=np.eye(T, k=back)), SCORE)
            w.move(head, "token", block, letter)
        for block in ("a", "b"):
            head = w.head(second, "count")
            query = {block: np.eye(6, 7), "one": np.eye(1, 7, 6)}
            w.match(head, query, dict(token=padded, bos=np.eye(1, 7, 6)), SCORE)
            w.move(head, "bos", f"share_{block}", np.ones((1, 1)))
        steep = 40.0  # shares differ by 1/30 or more
        sign, ones, zeros = np.repeat([-1.0, 1.0], 12), np.ones(12), np.zeros((6, 12))
        both = np.hstack([np.eye(6), np.eye(6)])
        reads = dict(
            share_a=steep * sign[None],
            share_b=-steep * sign[None],
            a=np.hstack([steep * both, zeros]),
            b=np.hstack([zeros, steep * both]),
        )
        # a is more frequent where its share of "<bos>" is less: clipped to 0 … 1, for a's letter
        step = np.repeat([0.0, -1.0], 6)
        bias = np.concatenate([-steep * ones + step, -steep * ones + step])
        w.neurons(second, reads, bias, dict(out=np.vstack([np.eye(6), -np.eye(6)] * 2)))
        w.answer("out", LOGIT * np.eye(6), range(1, 7))
        return w


@dataclass(frozen=True)
class Sort(DrawnTask):
    """ "<bos> x1 … x5 | x1 … x5 ; s1 …" → the five letters in order; all five are judged.

    The letters are given twice, since a causal model sees all of them from the second copy only.
    """

    name = "sort"
    summary = "five letters in alphabetical order"
    citation = "Lindner et al. 2023, arXiv 2301.05062 (sort_unique)"
    words = ("<bos>", *LETTERS, "|", ";")
    length, n = 17, 5

    def draw(self, rng: np.random.Generator) -> list[int]:
        letters = (1 + rng.choice(len(LETTERS), self.n, replace=False)).tolist()
        return [0, *letters, 17, *letters, 18, *sorted(letters)[:-1]]

    def solve(self, ids: list[int]) -> dict[int, Answer]:
        letters = sorted(ids[1 : 1 + self.n])
        start = self.length - self.n
        return {
            start + i: (right, tuple(x for x in letters if x != right))
            for i, right in enumerate(letters)
        }

    def wire(self, rng: np.random.Generator) -> Wiring:
        """A head of the second copy looks evenly at "<bos>" and at every smaller letter of the
        first; an MLP makes a rank of the share of "<bos>"; two heads look for the rank that is due
        and bring the letter's row and column."""
        T, V, n = self.length, len(self.words), self.n
        w = Wiring(_size(T), dict(share=1, rank=n, row=4, column=4), V, rng)
        first, second = _stages(rng)
        count = w.head(first, "count smaller")
        letter = np.eye(V)[:, 1:17]
        smaller = np.tril(np.ones((16, 16)), -1)  # [query letter, key letter]
        w.match(count, dict(token=letter), dict(token=letter @ smaller.T), SCORE)
        key = dict(place=_one(T, *range(1, 1 + n)), bos=2 * _one(1, 0))
        w.match(count, dict(one=_one(1, 0)), key, SCORE)
        w.move(count, "bos", "share", np.ones((1, 1)))
        wide = 0.01  # shares 1, 1/2 … 1/5 lie .05 apart or more
        at = np.repeat(1 / np.arange(1, n + 1), 4) + np.tile([-2 * wide, -wide, wide, 2 * wide], n)
        signs = np.tile([1.0, -1.0, -1.0, 1.0], n) / wide
        writes = signs[:, None] * np.repeat(np.eye(n), 4, 0)
        w.neurons(first, dict(share=np.ones((1, 4 * n))), -at, dict(rank=writes))
        due = np.zeros((T, n))
        due[T - n :] = np.eye(n)
        for block, mapped in _letters(w, 1).items():
            head = w.head(second, "copy")
            w.match(head, dict(place=due), dict(rank=np.eye(n)), SCORE)
            again = _one(T, *range(n + 2, 2 * n + 2))
            w.match(head, dict(one=_one(1, 0)), dict(place=again), SCORE)
            w.move(head, "token", block, mapped)
        return w


@dataclass(frozen=True)
class Led(DrawnTask):
    """ "<bos> …11 of x, y and o… ?" → x or y: which of the two was ahead at more places."""

    name = "frac_prevs"
    summary = "which of two tokens was ahead most often"
    citation = "Lindner et al. 2023, arXiv 2301.05062 (frac_prevs)"
    words = ("<bos>", "x", "y", "o", "?")
    length = 13

    def draw(self, rng: np.random.Generator) -> list[int]:
        while True:
            ids = [0, *rng.choice([1, 2, 3], self.length - 2, p=[0.4, 0.4, 0.2]).tolist(), 4]
            if self._ahead(ids):
                return ids

    def _ahead(self, ids: list[int]) -> int:
        """At how many more places x leads than y."""
        leads = np.sign(np.cumsum(np.array(ids) == 1) - np.cumsum(np.array(ids) == 2))
        return int(leads.sum())

    def solve(self, ids: list[int]) -> dict[int, Answer]:
        right, wrong = (1, 2) if self._ahead(ids) > 0 else (2, 1)
        return {self.length - 1: (right, (wrong,))}

    def wire(self, rng: np.random.Generator) -> Wiring:
        """Two heads look evenly at all that came before: the share of x, that of y; an MLP says at
        each place which is ahead; two heads take the mean of that; an MLP compares."""
        T, V = self.length, len(self.words)
        blocks = dict(share_x=1, share_y=1, lead_x=1, lead_y=1, mean_x=1, mean_y=1, out=2)
        w = Wiring(_size(T), blocks, V, rng)
        first, second = _stages(rng)
        for word, name in ((1, "x"), (2, "y")):
            w.move(w.head(first, "share"), "token", f"share_{name}", _one(V, word))
        for name in ("x", "y"):
            w.move(w.head(second, "mean lead"), f"lead_{name}", f"mean_{name}", np.ones((1, 1)))
        # differences are 1/13 or more; each made 0 … 1 by two neurons
        sign, bias = 2 * T * np.array([[1.0, 1.0, -1.0, -1.0]]), np.array([0.0, -1.0, 0.0, -1.0])
        x, y = np.array([[1.0], [-1.0], [0.0], [0.0]]), np.array([[0.0], [0.0], [1.0], [-1.0]])
        w.neurons(first, dict(share_x=sign, share_y=-sign), bias, dict(lead_x=x, lead_y=y))
        reads = dict(mean_x=sign, mean_y=-sign)
        w.neurons(second, reads, bias, dict(out=np.hstack([x, y])))
        w.answer("out", LOGIT * np.eye(2), (1, 2))
        return w


TASKS: dict[str, DrawnTask] = {task.name: task for task in (Reverse(), Frequent(), Sort(), Led())}
