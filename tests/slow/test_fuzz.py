"""Some hundred random and broken inputs; `python -m tests.fuzz` runs as many as one likes."""

from __future__ import annotations

import pytest
from fuzz.run import run
from fuzz.targets import SHARE, TARGETS


def test_every_target_has_a_share() -> None:
    assert set(SHARE) == set(TARGETS) and sum(SHARE.values()) == 100


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_no_traceback(name: str) -> None:
    report = run(name, {"cli": 15, "gguf": 20}.get(name, 45), 0)
    assert not report.faults, report.to_json()["faults"]
    assert report.inputs >= 15


def test_a_seed_gives_the_same_again() -> None:
    one, again, other = (run("scores", 30, n).outcomes for n in (0, 0, 1))
    assert one == again != other
