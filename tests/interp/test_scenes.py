"""Rendered scenes: the world's rule and its breaking, words that say what is there, pictures that
show it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import interp
from interp import scenes
from interp.scenes import COLORS, OBJECTS, PARTNER, Scene, Thing, damage
from interp.scenes.render import CELL, SIZE, ground, pixels, sprites
from interp.scenes.words import WORDS
from interp.scenes.world import TOGETHER


def drawn(kind: str, n: int = 2000) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [getattr(scenes, kind)(rng) for _ in range(n)]


def test_usual_scenes_follow_the_rule_and_broken_ones_break_it() -> None:
    pairs = [(t.name, s.names) for s in drawn("usual") for t in s.things if t.name in PARTNER]
    together = np.mean([PARTNER[name] in names for name, names in pairs])
    expected = (
        2 * TOGETHER / (2 * TOGETHER + 1 - TOGETHER)
    )  # an object counts twice where its companion is there
    assert abs(together - expected) < 0.02
    for scene in drawn("broken"):
        companions = [t.name for t in scene.things if t.name in PARTNER]
        assert len(companions) * 2 >= len(scene.things) >= 2
        assert not any(PARTNER[name] in scene.names for name in companions)


@pytest.mark.parametrize("kind", ["usual", "broken"])
def test_scenes_are_well_made(kind: str) -> None:
    for scene in drawn(kind, 500):
        cells = [t.cell for t in scene.things]
        assert len(set(cells)) == len(cells) == len(scene.names)
        assert all(t.name in OBJECTS and t.color in COLORS for t in scene.things)
        leaders = [t.cell for i, t in enumerate(scene.things)
                   if not i or PARTNER.get(scene.things[i - 1].name) != t.name]  # fmt: skip
        assert leaders == sorted(leaders)  # groups as one reads, companions next to each other
    assert {n for s in drawn(kind) for n in s.names} == set(OBJECTS)


def test_seeds() -> None:
    one, two = (scenes.usual(np.random.default_rng(3)) for _ in range(2))
    assert one == two and np.array_equal(pixels(one), pixels(two))
    assert one != scenes.usual(np.random.default_rng(4))


def test_captions_say_what_is_there() -> None:
    scene = Scene(
        (Thing("table", "red", 0, 2), Thing("chair", "blue", 2, 0), Thing("ball", "white", 1, 1)), 7
    )
    told = "a red table top right and a blue chair bottom left and a white ball middle center ."
    assert scenes.caption(scene) == told
    assert scenes.mentions(told) == ["table", "chair", "ball"]
    assert scenes.mentions("A Table, a chairs and a table.") == ["table"]
    for one in drawn("usual", 200):
        assert frozenset(scenes.mentions(scenes.caption(one))) == one.names
        assert set(scenes.caption(one).split()) <= set(WORDS)
    assert set(scenes.question("star").split()) <= set(WORDS)


def test_pictograms_differ() -> None:
    assert set(sprites()) == set(OBJECTS)
    for name, cover in sprites().items():
        assert cover.shape == (14, 14) and cover.min() >= 0 and cover.max() > 0.99, name
    for a, b in itertools.combinations(OBJECTS, 2):
        assert np.abs(sprites()[a] - sprites()[b]).mean() > 0.05, (a, b)


def test_a_picture_is_its_background_but_where_things_are() -> None:
    thing = Thing("box", "red", 1, 2, shown=1.0)
    picture = pixels(Scene((thing,), 5)).astype(int)
    empty = ground(5).clip(0, 255).astype(np.uint8).astype(int)
    changed = (picture != empty).any(-1)
    rows, columns = np.nonzero(changed)
    assert CELL <= rows.min() <= rows.max() < 2 * CELL <= columns.min() <= columns.max() < SIZE
    assert picture[CELL + 8, 2 * CELL + 8].tolist() == list(COLORS["red"])
    faint = pixels(Scene((Thing("box", "red", 1, 2, shown=0.25),), 5)).astype(int)
    ratio = (faint - empty)[CELL + 8, 2 * CELL + 8] / (picture - empty)[CELL + 8, 2 * CELL + 8]
    assert np.allclose(ratio, 0.25, atol=0.03)
    assert scenes.render(Scene((thing,), 5)).size == (SIZE, SIZE)
    assert scenes.render(Scene((thing,), 5), 96).size == (96, 96)


def test_damage_takes_away_more_from_level_to_level() -> None:
    """What is left of the things: correlation of the picture's difference from its empty ground
    with that of the undamaged one falls from level to level, in each kind."""
    scene = scenes.usual(np.random.default_rng(5))
    bare = pixels(Scene((), scene.ground)).astype(float)
    whole = (pixels(scene) - bare).ravel()
    assert whole.any()
    for kind in damage.KINDS:
        series = [scenes.damaged(scene, kind, level, 3) for level in damage.LEVELS]
        again = [scenes.damaged(scene, kind, level, 3) for level in damage.LEVELS]
        assert [one.tobytes() for one in series] == [one.tobytes() for one in again]
        left = [float((np.asarray(one) - bare).ravel() @ whole / (whole @ whole)) for one in series]
        apart = [np.abs(np.asarray(one, dtype=float) - pixels(scene)).mean() for one in series]
        assert apart == sorted(apart) and apart[0] > 0
        if kind != "noise":  # which is beside the things, not less of them
            assert left == sorted(left, reverse=True) and left[0] < 1
    assert (np.asarray(scenes.damaged(scene, None)) == pixels(scene)).all()


@pytest.mark.parametrize(("kind", "level"), [("rain", 1), ("blur", 0), ("blur", 4)])
def test_no_such_damage(kind: str, level: int) -> None:
    with pytest.raises(interp.errors.InputError):
        scenes.damaged(scenes.usual(np.random.default_rng(0)), kind, level)
