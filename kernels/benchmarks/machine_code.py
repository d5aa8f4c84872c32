"""What a kernel compiled to, read from its machine code without a GPU: registers, spills, shared
memory, tensor-core instructions and loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: A tensor-core instruction: HMMA (sm_80, 89, 120), HGMMA (sm_90), UTCHMMA and its kin, which
#: tcgen05 is in machine code (sm_100).
PRODUCT = re.compile(r"\b(HG?MMA|UTC\w*MMA)")
_SPILL = re.compile(r"\b(STL|LDL)\b")


def instructions_of(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in their order, and which of them each label stands before."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in sass.splitlines():
        if line.startswith(".L_"):
            labels[line.rstrip(":").strip()] = len(found)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            found.append(line)
    return found, labels


def loops_of(found: list[str], labels: dict[str, int]) -> list[tuple[int, int, int]]:
    """(instructions, products, accesses to spilled registers) of each loop."""
    # what stands behind the last exit are the retries of waits, which jump back into their loop
    last = max((i for i, line in enumerate(found) if re.search(r"\bEXIT\b", line)), default=0)
    loops = []
    for i, line in enumerate(found[: last + 1]):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], i + 1) <= i:
            body = found[labels[jump[1]] : i + 1]
            counts = (sum(one.search(x) is not None for x in body) for one in (PRODUCT, _SPILL))
            loops.append((len(body), *counts))
    return loops


def read(kernel: Any) -> dict[str, Any]:
    """Of a kernel that Triton compiled: `spilled` bytes a thread, `hot_spills` accesses to them in
    the shortest loop with products, which is the one over whole tiles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True
        ).stdout
    found, labels = instructions_of(sass)
    loops = loops_of(found, labels)
    hot = min((one for one in loops if one[1]), default=(0, 0, 0))

    def used(what: str) -> int:
        number = re.search(rf"{what}:(\d+)", usage)
        return int(number[1]) if number else 0

    def count(pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in found)

    return dict(
        kernel=kernel.metadata.name,
        registers=used("REG"),
        spilled=max(used("LOCAL"), used("STACK")),
        hot_spills=hot[2],
        shared=kernel.metadata.shared,
        hgmma=count(r"\bHGMMA"),
        mma=count(r"\bHMMA"),
        tcgen05=count(r"\bUTC\w*MMA"),
        loops=[one[:2] for one in loops],
        warps=kernel.metadata.num_warps,
    )
