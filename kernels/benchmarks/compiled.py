"""Ahead-of-time check: compile the kernels for GPUs that need not be there, and read what came out.

    python kernels/benchmarks/compiled.py [--families 80 89 90 100 120] [--only NAME|NAME]
        [--jobs 2] [--json FILE] [--check]
    python kernels/benchmarks/compiled.py --committed    (check the committed results)
    python kernels/benchmarks/compiled.py --table        (Markdown of the committed results)

The real launchers run on small CPU tensors with Triton's launch cut off after compilation, so every
argument is specialised as on a GPU. Printed for each kernel: registers a thread, spilled bytes (and
accesses to them in the hot loop, the shortest one with products), shared memory, tensor-core
instructions (HMMA, HGMMA on sm_90, tcgen05 on sm_100) and the length of the hot loop. --check: exit
1 if something spills in a hot loop, but where that is `KNOWN`, or if a kernel spills more than 128
bytes, asks for more shared memory than the family has, or does its products beside the tensor
cores. --committed compiles nothing: exit 1 for the same in the committed results, and where they
are of other sources or another Triton.

What was compiled and read is kept in $INTERP_AOT_CACHE (a folder in the system's temporary one
unless set), by the hash of source, settings and Triton, so that only changes cost time. Must not
run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "compiled" / "kernels.json"  # beside what `interp bench` lists
CACHE = Path(
    os.environ.get("INTERP_AOT_CACHE") or Path(tempfile.gettempdir(), f"interp-aot-{os.getuid()}")
)

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
import triton  # noqa: E402
from machine_code import read  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

#: Shared memory a program may have, in bytes.
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
#: Kernels that multiply matrices.
WITH_PRODUCTS = (
    "forward_kernel",
    "specialised_kernel",
    "received_kernel",
    "row_kernel",
    "split_kernel",
)
#: Bytes of registers spilled outside hot loops that are let pass.
LITTLE = 128
#: (family, kernel) → accesses to spilled registers in its hot loop, of some 500 instructions, that
#: are known: arg-max beside other statistics. The tiles that spill nothing are narrower, and take
#: two fifths more instructions a logit, or twice the traffic of keys.
KNOWN = {
    (90, "forward entropy+argmax d128"): 2,
    (90, "forward argmax+capped d128"): 4,
    (90, "forward few statistics d128"): 2,
}


class _Driver:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton keeps what it compiled by device: one a family

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[Any]]:
    """Kernel launches inside only compile, with that GPU's tiles; what was compiled is in the
    list."""
    from interp_kernels.fused import configs

    found: list[Any] = []
    launch, capability_of = JITFunction.run, configs.capability

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(kernel)
        return kernel

    triton.runtime.driver.set_active(_Driver(capability))
    JITFunction.run = only_compile
    configs.capability = lambda index: divmod(capability, 10)
    try:
        yield found
    finally:
        JITFunction.run, configs.capability = launch, capability_of


def reading(kernel: Any) -> dict[str, Any]:
    """`read`, kept by the hash of what was compiled."""
    kept = CACHE / "readings" / f"{kernel.hash}.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(read(kernel)))
        part.replace(kept)
    return json.loads(kept.read_text())


def faults(name: str, row: dict[str, Any], family: int) -> list[str]:
    """What is wrong with a kernel's machine code."""
    found = []
    if row["hot_spills"] > KNOWN.get((family, name), 0):
        found.append(f"{row['hot_spills']} accesses to spilled registers in the hot loop")
    if row["spilled"] > LITTLE:
        found.append(f"{row['spilled']} bytes spilled")
    if row["shared"] > SHARED[family]:
        found.append(f"{row['shared']} bytes of shared memory of {SHARED[family]}")
    if row["kernel"] in WITH_PRODUCTS:
        # few rows do not fill a tile of the newer instructions, nor do float32's registers, nor the
        # few that statistics of 512 dimensions leave
        own = {90: "hgmma", 100: "tcgen05"}.get(family, "mma")
        heavy = name.startswith("forward all") and name.endswith("d512")
        small = row["kernel"] == "split_kernel" or "fp32" in name or heavy
        if not (row[own] or (small and row["mma"])):
            found.append(f"no product on the tensor cores by {own}")
    return found


def sweep(family: int, only: str) -> dict[str, dict[str, Any]]:
    """name → row; what does not compile has an `error`."""
    import compile_cases

    table: dict[str, dict[str, Any]] = {}
    for name, launch in compile_cases.cases(family).items():
        if not any(one in name for one in only.split("|")):
            continue
        try:
            with compiling(family) as found:
                launch()
        except Exception as error:
            table[name] = dict(error=f"{type(error).__name__}: {str(error).strip()[-300:]}")
            print(f"sm_{family} {name:32} {table[name]['error']}", flush=True)
            continue
        for kernel in found:
            row = reading(kernel)
            loops = [one for one in row.pop("loops") if one[1]]
            row["loop"] = min((n for n, _ in loops), default=0)
            table[name if len(found) == 1 else f"{name}: {row['kernel']}"] = row
            print(line(family, name, row), flush=True)
    return table


def line(family: int, name: str, row: dict[str, Any]) -> str:
    products = row["hgmma"] or row["tcgen05"] or row["mma"]
    wrong = "; ".join(faults(name, row, family))
    return (
        f"sm_{family} {name:32}{row['kernel']:18}{row['registers']:4} registers"
        f"{row['spilled']:5} B spilled ({row['hot_spills']} hot){row['shared']:8} B shared"
        f"{products:5} products{row['warps']:3} warps, loop {row['loop']}"
        + (f"  ! {wrong}" if wrong else "")
    )


def side_by_side(families: list[int], only: str, jobs: int) -> dict[int, dict[str, Any]]:
    """Each family in a process of its own, `jobs` of them at a time."""
    found: dict[int, dict[str, Any]] = {}
    waiting, running = list(families), dict[int, Any]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                family = waiting.pop(0)
                out = Path(folder, f"{family}.json")
                call = [sys.executable, __file__, "--families", str(family), "--only", only]
                running[family] = subprocess.Popen([*call, "--json", str(out)])
            family, process = next(iter(running.items()))
            if process.wait():
                raise SystemExit(f"compiling for sm_{family} failed")
            del running[family]
            found[family] = json.loads(Path(folder, f"{family}.json").read_text())["families"][
                str(family)
            ]
    return {family: found[family] for family in families}


#: Rows of the table in the documentation.
SHOWN = ("forward plain", "forward all", "received", "decode")


def markdown(result: dict[str, Any]) -> str:
    """registers / spilled bytes / shared memory of the kernels that matter most, by family and head
    dimension."""
    import compile_cases

    lines = ["| | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for family, table in result["families"].items():
        for d in sorted((*compile_cases.DIMS, *compile_cases.MORE_DIMS)):
            cells = []
            for name in SHOWN:
                key = f"{name} d{d}"
                row = table.get(key) or table[f"{key}: split_kernel"]
                hot = "*" if row["hot_spills"] else ""
                cells.append(f"{row['registers']} / {row['spilled']}{hot} / {row['shared']:,}")
            lines.append(f"| sm_{family}, D = {d} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sources() -> str:
    """A digest of what is compiled, and of what reads it."""
    files = [*(HERE.parent / "interp_kernels" / "fused").glob("*.py"),
             HERE / "compile_cases.py", HERE / "machine_code.py"]  # fmt: skip
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def wrong(found: dict[Any, dict[str, Any]]) -> list[str]:
    """Every fault of every family's table."""
    return [
        f"sm_{family} {name}: {fault}"
        for family, table in found.items()
        for name, row in table.items()
        for fault in ([row["error"]] if "error" in row else faults(name, row, int(family)))
    ]


def committed(result: dict[str, Any]) -> list[str]:
    """What is wrong with the committed results: faults, and whether they are of these sources."""
    found = wrong(result["families"])
    if set(result["families"]) != set(map(str, SHARED)):
        found.append(f"families {sorted(result['families'])} of {sorted(map(str, SHARED))}")
    own = dict(triton=triton.__version__, sources=sources())
    if {name: result.get(name) for name in own} != own:
        found.append(
            "the committed results are of other sources or another Triton; make them anew: python "
            "kernels/benchmarks/compiled.py --jobs 2 --check --json "
            f"{RESULTS.relative_to(HERE.parents[1])}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", type=int, nargs="+", default=list(SHARED))
    parser.add_argument(
        "--only", default="", help="only names that contain it, or one of several between |"
    )
    parser.add_argument("--jobs", type=int, default=1, help="families side by side")
    parser.add_argument("--json", help="also write the table there")
    parser.add_argument("--check", action="store_true", help="exit 1 where something is wrong")
    parser.add_argument("--committed", action="store_true", help="check the committed results")
    parser.add_argument("--table", action="store_true", help="print the committed results")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(RESULTS.read_text())))
        return
    if arguments.committed:
        if found := committed(json.loads(RESULTS.read_text())):
            raise SystemExit("\n".join(["", *found]))
        return
    families = arguments.families
    if len(families) > 1:
        tables = side_by_side(families, arguments.only, arguments.jobs)
    else:
        tables = {families[0]: sweep(families[0], arguments.only)}
    result = dict(triton=triton.__version__, sources=sources(), families=tables)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=0) + "\n")
    if arguments.check and (faulty := wrong(tables)):
        raise SystemExit("\n".join(["", *faulty]))


if __name__ == "__main__":
    main()
