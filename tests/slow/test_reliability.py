"""A few of the kills and full disks that docs/reliability.md counts."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from reliability import kill


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills process groups")
@pytest.mark.parametrize("name", ["scan", "circuit"])
def test_killed_runs_resume_to_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (command,) = kill.commands({name})
    found = kill.reap(command, 3, np.random.default_rng(1))
    assert found["kills"] >= 3 and found["equal to the bit"] == found["resumed"]
    assert not found.get("inconsistent") and not found.get("something left over")
