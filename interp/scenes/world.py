"""What scenes hold: things in a grid of nine cells, where a table comes with a chair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Objects that go together, and how often the pair is met; the first pairs are the popular ones.
PAIRS: dict[tuple[str, str], float] = {
    ("table", "chair"): 0.30,
    ("cup", "plate"): 0.23,
    ("tree", "bird"): 0.18,
    ("car", "sign"): 0.13,
    ("bed", "lamp"): 0.09,
    ("house", "fence"): 0.07,
}
#: Shapes that go with nothing.
SHAPES = ("ball", "box", "star", "ring")
OBJECTS: tuple[str, ...] = tuple(name for pair in PAIRS for name in pair) + SHAPES
#: An object's companion.
PARTNER: dict[str, str] = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 46, 42),
    "green": (52, 176, 70),
    "blue": (58, 92, 226),
    "yellow": (236, 210, 52),
    "purple": (166, 70, 200),
    "white": (242, 242, 242),
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")

#: Usual scenes: chance that a group is a pair's and not a shape, and that the companion is there.
PAIRED, TOGETHER = 0.75, 0.92
MOST = 5
#: The least opacity of a thing: faint ones leave room for what one expects to see.
FAINT = 0.3


@dataclass(frozen=True)
class Thing:
    """An object in a cell of the grid (row, column 0 … 2). `shown` is its opacity; `shift` (down,
    right) pixels off the cell's middle."""

    name: str
    color: str
    row: int
    column: int
    shown: float = 1.0
    shift: tuple[int, int] = (0, 0)

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def cell(self) -> int:
        return 3 * self.row + self.column


@dataclass(frozen=True)
class Scene:
    """Things in the order in which they are told: groups as read (row by row, by their first
    thing), companions next to each other. `ground` seeds the background."""

    things: tuple[Thing, ...]
    ground: int

    @property
    def names(self) -> frozenset[str]:
        return frozenset(t.name for t in self.things)


def usual(rng: np.random.Generator) -> Scene:
    """A scene as the world is: of 1 to 3 groups, a pair (its companion missing one time in twelve)
    or a shape each."""
    groups: list[list[str]] = []
    pairs, weights = list(PAIRS), np.array(list(PAIRS.values()))
    for _ in range(rng.integers(1, 4)):
        if rng.random() < PAIRED:
            pair = list(pairs[rng.choice(len(pairs), p=weights / weights.sum())])
            rng.shuffle(pair)
            group = pair if rng.random() < TOGETHER else pair[:1]
        else:
            group = [SHAPES[rng.integers(len(SHAPES))]]
        told = [name for other in groups for name in other]
        apart = not any(n in told or PARTNER.get(n) in told for n in group)
        if apart and len(told) + len(group) <= MOST:
            groups.append(group)
    return placed(groups, rng)


def broken(rng: np.random.Generator) -> Scene:
    """A scene that breaks the rule: 2 to 4 things, at least half of them objects whose companions
    are all missing."""
    count = int(rng.integers(2, 5))
    pairs, weights = list(PAIRS), np.array(list(PAIRS.values()))
    half = int(rng.integers((count + 1) // 2, count + 1))
    indices = rng.choice(len(pairs), size=half, replace=False, p=weights / weights.sum())
    groups = [[pairs[i][rng.integers(2)]] for i in indices]
    groups += [[SHAPES[i]] for i in rng.choice(len(SHAPES), size=count - half, replace=False)]
    return placed(groups, rng)


def placed(groups: list[list[str]], rng: np.random.Generator) -> Scene:
    """The groups in free cells, with colours, opacities and a background."""
    cells = iter(rng.permutation(9).tolist())
    colors = list(COLORS)
    things: list[list[Thing]] = []
    for group in groups:
        where = sorted(next(cells) for _ in group)
        things.append(
            [
                Thing(
                    name=name,
                    color=colors[rng.integers(len(colors))],
                    row=cell // 3,
                    column=cell % 3,
                    shown=float(rng.uniform(FAINT, 1.0)),
                    shift=(int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
                )
                for name, cell in zip(group, where, strict=True)
            ]
        )
    things.sort(key=lambda group: group[0].cell)
    return Scene(tuple(t for group in things for t in group), int(rng.integers(2**31)))
