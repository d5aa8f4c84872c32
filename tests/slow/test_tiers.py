"""The tiers of the tests: which are begun when."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_long_test_is_begun_after_its_time() -> None:
    """Notebooks among them, which stand beside the folder of the tests."""
    call = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-m", "long", "-vv"]
    call += ["--long-until=1", "notebooks", "tests/slow/test_tiers.py"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    notebooks = sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
    skipped = re.findall(r"notebooks/(\S+\.ipynb)::.* SKIPPED", done.stdout)
    assert len(notebooks) >= 4 and sorted(skipped) == notebooks
