"""The kernels compiled ahead of time, without a GPU: tensor cores used, nothing spilled in a hot
loop, nothing over a family's shared memory. Here the kernels that want most; all flags of all
families, `.ci/run` looks at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"
sys.path.append(str(FOLDER))

FAMILIES = (80, 89, 90, 100, 120)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")


def compiled(out: Path, *arguments: str) -> dict[str, Any]:
    """What `compiled.py` reads from the machine code, from a process without TRITON_INTERPRET."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "compiled.py"), "--json", str(out), "--check", *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["families"]


@pytest.mark.slow
def test_families_side_by_side(tmp_path: Path) -> None:
    """The plain kernel of each, and the heaviest of two: no fault, and its own tensor cores."""
    table = compiled(tmp_path / "t.json", "--only", "forward plain d128", "--jobs", "1")
    assert sorted(map(int, table)) == list(FAMILIES)
    rows = {int(family): found["forward plain d128"] for family, found in table.items()}
    assert rows[90]["hgmma"] and not rows[90]["mma"]
    assert rows[100]["tcgen05"] and not rows[100]["hgmma"]
    for family in (80, 89, 120):
        assert rows[family]["mma"] and not rows[family]["hgmma"]
    # instructions a key of the unmasked loop (a warp, 128 rows): a regression shows here before any
    # GPU does
    assert rows[90]["loop"] / 128 < 4.5


@pytest.mark.slow
def test_every_kernel_of_one_family(tmp_path: Path) -> None:
    """Each kernel once; all flags of all families are half an hour (the committed table)."""
    names = (
        "forward all d128|received d128|rows top-k d128|decode statistics d128|merge d128|"
        "merge with gradients d128"
    )
    table = compiled(tmp_path / "t.json", "--families", "90", "--only", names)["90"]
    assert {row["kernel"] for row in table.values()} >= {
        "forward_kernel",
        "received_kernel",
        "row_kernel",
        "top_kernel",
        "split_kernel",
        "combine_kernel",
        "decode_statistics_kernel",
        "merge_kernel",
        "weighted_kernel",
        "weighted_backward_kernel",
    }
    assert all(row["registers"] <= 255 for row in table.values())
    assert table["forward all d128"]["loop"] / 64 < 10


#: As nvdisasm prints it: a loop with products and a spill, a wait's retry behind the exit.
SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   UTCHMMA gdesc[UR20], gdesc[UR4], tmem[UR17], idesc[UR7] ;
        /*0020*/                   STL [R1], R2 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0060*/                   BRA.U UP0, `(.L_x_2) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0090*/                   BRA `(.L_x_0) ;
"""


def test_loops_are_read_from_machine_code() -> None:
    import machine_code

    found, labels = machine_code.instructions_of(SASS)
    assert len(found) == 10
    assert machine_code.loops_of(found, labels) == [(3, 1, 1), (3, 2, 0)]


ROW = dict(kernel="forward_kernel", registers=200, spilled=0, hot_spills=0, shared=9000, warps=4)


@pytest.mark.parametrize(
    ("change", "family", "word"),
    [
        (dict(mma=3), 80, ""),
        (dict(mma=3), 90, "by hgmma"),
        (dict(hgmma=3), 90, ""),
        (dict(hgmma=3), 100, "by tcgen05"),
        (dict(tcgen05=3), 100, ""),
        (dict(mma=3, hot_spills=1), 80, "hot loop"),
        (dict(mma=3, spilled=900), 80, "900 bytes spilled"),
        (dict(mma=3, shared=101377), 120, "of 101376"),
        (dict(mma=3, shared=101377), 80, ""),
        (dict(mma=3, kernel="split_kernel"), 100, ""),
    ],
)
def test_faults_are_found(change: dict[str, Any], family: int, word: str) -> None:
    import compiled as module

    row = dict(ROW, mma=0, hgmma=0, tcgen05=0) | change
    found = "; ".join(module.faults("forward plain d64", row, family))
    assert (word in found) if word else not found


def test_what_is_known_to_spill_is_known_of_that_kernel_alone() -> None:
    import compiled as module

    for (family, name), count in module.KNOWN.items():
        row = dict(ROW, hgmma=3, mma=0, tcgen05=0, hot_spills=count)
        assert not module.faults(name, row, family)
        assert module.faults(name, row | dict(hot_spills=count + 1), family)
        assert module.faults("forward plain d64", row, family)
        found = json.loads(module.RESULTS.read_text())["families"][str(family)][name]
        assert found["hot_spills"] == count  # no more is let pass than there is


def test_tables_have_a_row_for_every_family_and_dimension() -> None:
    from interp_kernels.fused import configs

    for table in (configs._FORWARD, configs._FORWARD_32):
        assert tuple(sorted(table)) == FAMILIES
        for rows in table.values():
            spills = table is configs._FORWARD_32
            assert tuple(rows) == (configs.DIMS[:-2] if spills else configs.DIMS)
    devices = {
        (8, 0): 80, (8, 7): 80, (8, 6): 89, (8, 9): 89, (9, 0): 90, (10, 0): 100, (10, 3): 100,
        (12, 0): 120, (12, 1): 120, (11, 0): 120, (13, 0): 120,
    }  # fmt: skip
    import torch

    device = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        for capability, family in devices.items():
            patch.setattr(configs, "capability", lambda index, c=capability: c)
            assert configs.family(device) == family
            patch.setattr(configs, "INTERPRETED", False)
            why = configs.why_not(256, torch.float32, device)
            assert "float32 heads of dimension 256" in why
            assert not configs.why_not(192, torch.float32, device)
            assert not configs.why_not(512, torch.bfloat16, device)
    assert [configs.bucket(d) for d in (8, 64, 72, 80, 96, 112, 160, 192, 200, 256, 320)] == [
        64, 64, 96, 96, 96, 128, 192, 192, 256, 256, 512,
    ]  # fmt: skip


def test_the_committed_results_have_no_fault() -> None:
    import compiled as module

    result = json.loads(module.RESULTS.read_text())
    assert tuple(map(int, result["families"])) == FAMILIES
    for family, table in result["families"].items():
        assert len(table) > 80
        for name, row in table.items():
            assert "error" not in row, (family, name)
            assert not module.faults(name, row, int(family)), (family, name)


def test_results_of_other_sources_are_found() -> None:
    import compiled as module
    import triton

    result = json.loads(module.RESULTS.read_text())
    own = result | dict(triton=triton.__version__, sources=module.sources())
    assert module.committed(own) == []
    for stale in (dict(sources="0" * 64), dict(triton="3.5.0")):
        (said,) = module.committed(own | stale)
        assert "other sources or another Triton" in said and "--json kernels/" in said
    fewer = {k: v for k, v in own["families"].items() if k != "89"}
    assert "families" in module.committed(own | dict(families=fewer))[0]


def test_the_table_of_the_documentation_is_that_of_the_results() -> None:
    import compiled as module

    docs = (FOLDER.parents[1] / "docs" / "kernels.md").read_text()
    assert module.markdown(json.loads(module.RESULTS.read_text())) in docs


def test_every_launch_asks_for_fused_multiply_adds() -> None:
    """By name: Triton 3.10 leaves them off otherwise."""
    import ast

    launches = 0
    for path in (FOLDER.parent / "interp_kernels" / "fused").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)):
                continue
            name = getattr(node.func.value, "id", "")
            if name.endswith("_kernel"):
                launches += 1
                asked = {one.arg: ast.unparse(one.value) for one in node.keywords}
                assert asked.get("enable_fp_fusion") == "True", (path.name, name)
    assert launches == 11


def test_what_the_documentation_says_of_triton_3_6() -> None:
    import compiled as module

    found = json.loads((module.RESULTS.parent / "triton_3_6.json").read_text())
    rows = found["families"]["90"]
    assert found["triton"].startswith("3.6.") and not [r for r in rows.values() if "error" in r]
    assert all(row["shared"] <= module.SHARED[90] for row in rows.values())
    spilling = {name: row["hot_spills"] for name, row in rows.items() if row["hot_spills"]}
    assert spilling == {"forward all dense bias d256": 2}
    docs = (FOLDER.parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"all {len(rows)} kernels of sm_90 compile and fit" in docs
