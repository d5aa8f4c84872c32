"""The kernels compiled ahead of time for sm_90, without a GPU: tensor cores used, nothing spilled
in a hot loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "kernels" / "benchmarks" / "compiled.py"

pytestmark = [  # every kernel is compiled
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux"),
]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `compiled.py` reads from the machine code, from a process without TRITON_INTERPRET."""
    out = tmp_path_factory.mktemp("aot") / "table.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(out.parent / "cache")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(out)],
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_every_kernel_compiles(table: dict[str, Any]) -> None:
    kernels = {row["kernel"] for row in table.values()}
    assert kernels >= {
        "forward_kernel",
        "received_kernel",
        "split_kernel",
        "combine_kernel",
        "merge_kernel",
        "weighted_kernel",
        "weighted_backward_kernel",
    }


def test_products_run_on_tensor_cores(table: dict[str, Any]) -> None:
    """HGMMA in every loop over tiles; where few rows do not fill one (decode; float32, for its
    registers), HMMA."""
    for name, row in table.items():
        if row["kernel"] in ("forward_kernel", "received_kernel", "split_kernel"):
            assert row["hgmma"] + row["mma"] > 0, name
        if row["kernel"] in ("forward_kernel", "received_kernel") and "fp32" not in name:
            assert row["hgmma"] > 0, name


def test_nothing_spills_in_a_hot_loop(table: dict[str, Any]) -> None:
    """No local memory touched in the loop over whole tiles; around it and in the few masked tiles,
    little."""
    for name, row in table.items():
        assert row["hot_spills"] == 0, name
        assert row["spilled"] <= 128, name
        assert row["registers"] <= 255, name


def test_the_plain_loop_is_short(table: dict[str, Any]) -> None:
    """Instructions a key of the unmasked loop (a warp, 128 rows): a regression would show here
    before any GPU does."""
    per_key = table["forward plain"]["loops"][0][0] / 128
    assert per_key < 4.5
    assert table["forward all"]["loops"][0][0] / 64 < 10
