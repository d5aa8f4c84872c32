"""Score files of other projects, alone, on a model of another size, compared, written again."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
from hypothesis import strategies as st

import interp
from interp.results.interchange import catalogue

from ..nasty import broken, json_texts
from ..target import Target

random_numbers = random.Random(0)
LISTS = {
    f"{n}-{h}": [random_numbers.random() for _ in range(3)] for n in range(3) for h in range(4)
}
DOCUMENTS: list[Any] = [
    LISTS,
    {"scores": LISTS, "trial_ids": ["a", "b", "c"], "meta": {"model": "m"}},
    {"0": [1, 2], "2": [3]},
    [[0, 1], [2, 3]],
    ["0-1", "L2H3"],
    {"0-1": 0.5, "2-3": 0.25},
    [[0.5, [0, 1]], [0.25, [2, 3]]],
    [{"layer": 0, "head": 1, "score": 0.5}, {"layer": 2, "head": 3, "score": 0.1}],
    [[0.1, 0.2, 0.3, 0.4]] * 3,
    [[128, 64, 32, 16]] * 3,
]
GATES = "\n".join("\t".join(f"{g:.18e}" for g in (0.5, 0.25)) for _ in range(3)) + "\n"
SHAPES = [
    None,
    None,
    None,
    (3, 4),
    (3, 4),
    (3, 4, 2),
    (3, 4, 2),
    (2, 2),
    (30, 9, 3),
    (3, 4, 3),
    "x",
    (0, 1),
    (10**9, 2),
]


class ScoreFiles(Target):
    """`Atlas.read`, `compare` and `write_json` of files and their mutations."""

    name = "scores"

    def prepare(self) -> None:
        (self.folder / "other.json").write_text(json.dumps(LISTS))

    def inputs(self) -> st.SearchStrategy[Any]:
        content = st.one_of(
            json_texts(DOCUMENTS),
            json_texts(DOCUMENTS),
            broken(GATES.encode()),
            st.sampled_from(DOCUMENTS).map(lambda d: json.dumps(d).encode()),
            st.just(GATES.encode()),
        )
        return st.tuples(
            content,
            st.sampled_from(SHAPES),
            st.sampled_from([None] * 24 + catalogue.names()),
            st.sampled_from(["read", "compare", "write", "save"]),
            st.sampled_from(catalogue.names()),
            st.sampled_from([None, "mean", "max"]),
        )

    def run(self, value: Any) -> str:
        content, shape, format, then, other, group = value
        path = self.folder / "scores"
        path.write_bytes(content)
        atlas = interp.Atlas.read(path, shape, format=format)
        score = atlas.scores[0]
        matrix = _places(atlas)
        assert np.isfinite(matrix.compressed()).all() and matrix.count()
        if then == "compare":
            table = interp.compare(atlas, self.folder / "other.json", group=group)
            assert all(v is None or -1.001 <= v <= 1.001 for v in table["spearman"])
        elif then == "write":
            written = atlas.write_json(self.folder / "again", score, format=other, group=group)
            again = interp.Atlas.read(written, format=other)
            if other != "pasta" and group is None:
                np.testing.assert_array_equal(_places(again).compressed(), matrix.compressed())
        elif then == "save":
            assert interp.Atlas.load(atlas.save(self.folder / "saved")).frame.equals(atlas.frame)
        return f"right: {then}"


def _places(atlas: interp.Atlas) -> np.ma.MaskedArray:
    """The numbers of its only score, one a place."""
    score = atlas.scores[0]
    return atlas.cells(score, *atlas.panel(score, "", None), atlas.about(score).grain)
