"""Models whose heads several processes share out (`tp_plan`) are seen and edited as in one: each
answer beside the same model's in one process, in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interp_hooks.huggingface import shards
from interp_hooks.huggingface.shards import shards_of

HERE = Path(__file__).parent
#: grouped keys; biases; norms of queries and keys; windows and soft caps; a fused projection, whose
#: heads are gathered before the attention; learned sinks, whose heads nobody shares out
FAMILIES = {
    "llama": True,
    "qwen2": True,
    "qwen3": True,
    "gemma2": True,
    "gemma3": True,
    "olmo2": True,
    "phi3": True,
    "gpt_oss": False,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """family → what two processes found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "tensor_parallel_worker.py"), str(tmp_path_factory.mktemp("models"))]
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*command, *FAMILIES], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {family: what for line in lines for family, what in line.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_answer_as_one(found: dict[str, Any], family: str) -> None:
    assert "refused" not in found[family], found[family]
    assert found[family]["shared"] == FAMILIES[family]
    apart = found[family]["apart"]
    assert len(apart) > 30
    assert max(apart.values()) < 5e-6, sorted(apart.items(), key=lambda item: -item[1])[:5]


class Mesh:
    """Two processes, of which this is the second."""

    mesh_dim_names = ("tp",)

    def __getitem__(self, name: str) -> Mesh:
        return self

    def size(self) -> int:
        return 2

    def get_group(self, name: str) -> None:
        return None

    def get_local_rank(self, name: str) -> int:
        return 1


class Linear(torch.nn.Module):
    """A layer of which a matrix (rows, columns) is shared out along `dim`."""

    def __init__(self, rows: int, columns: int, dim: int):
        super().__init__()
        self.__dict__["weight"] = Sharded(rows, columns, dim)


class Sharded:
    def __init__(self, rows: int, columns: int, dim: int):
        self.shape, self.ndim = (rows, columns), 2
        self.device_mesh, self.placements = Mesh(), [Placement(dim)]


class Placement:
    def __init__(self, dim: int):
        self.dim = dim


@pytest.mark.parametrize("width, size", [(64, 2), (32, None)])
def test_what_reads_z_says_whether_heads_are_shared_out(
    width: int, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = SimpleNamespace(DTensor=Sharded, Shard=Placement)
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", kinds)
    attention = torch.nn.Sequential(Linear(64, 16, 0), Linear(16, width, 1))
    heads = torch.zeros(1, 4, 3, 8)  # 4 heads of 8 in this process
    one = shards_of(attention, heads, heads)
    assert (None if one is None else (one.size, one.rank)) == (size and (size, 1))


def test_what_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = SimpleNamespace(DTensor=Sharded, Shard=Placement)
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", kinds)
    heads = torch.zeros(1, 4, 3, 8)
    for odd in (Linear(64, 16, 0), Linear(16, 48, 1)):
        with pytest.raises(shards.TapError, match="not understood"):
            shards_of(torch.nn.Sequential(odd), heads, heads)
