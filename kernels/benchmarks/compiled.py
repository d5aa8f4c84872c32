"""Ahead-of-time check: compile the kernels for a GPU that need not be there, and read what came
out.

    python kernels/benchmarks/compiled.py [--json FILE] [--only NAME]

The real launchers run on small CPU tensors with Triton's launch cut off after compilation, so every
argument is specialised as on a GPU. Printed for each kernel: registers a thread, spilled bytes (and
accesses to them in the hot loop, the shortest one with products), HGMMA (tensor core) instructions,
and the length of each loop with products. Must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[Any]]:
    """Kernel launches inside only compile; what was compiled is in the list."""
    found: list[Any] = []
    launch = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(kernel)
        return kernel

    triton.runtime.driver.set_active(_Driver(capability))
    JITFunction.run = only_compile
    try:
        yield found
    finally:
        JITFunction.run = launch


def read(kernel: Any) -> dict[str, Any]:
    """Registers, spills (bytes of local memory), tensor-core instructions and the longest loop of
    one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True
        ).stdout
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True
        ).stdout
    lines = [
        line
        for line in sass.splitlines()
        if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line) or line.startswith(".L_")
    ]
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in lines:
        if line.startswith(".L_"):
            labels[line.rstrip(":").strip()] = len(instructions)
        else:
            instructions.append(line)
    loops, spills = [], []
    for i, line in enumerate(instructions):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], i + 1) <= i:
            body = instructions[labels[jump[1]] : i + 1]
            products = sum(re.search(r"\bH(G)?MMA", x) is not None for x in body)
            loops.append((len(body), products))
            if products:
                spills.append(
                    (len(body), sum(re.search(r"\b(STL|LDL)\b", x) is not None for x in body))
                )
    local = int(re.search(r"LOCAL:(\d+)", usage)[1]) if "LOCAL:" in usage else 0  # type: ignore[index]
    stack = int(re.search(r"STACK:(\d+)", usage)[1]) if "STACK:" in usage else 0  # type: ignore[index]
    return dict(
        kernel=kernel.metadata.name,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        spilled=max(local, stack),
        hot_spills=min(spills)[1] if spills else 0,
        shared=kernel.metadata.shared,
        hgmma=sum("HGMMA" in x for x in instructions),
        mma=sum(re.search(r"\bHMMA", x) is not None for x in instructions),
        loops=loops,
        warps=kernel.metadata.num_warps,
    )


def cases() -> dict[str, Callable[[], Any]]:
    """name → what launches it."""
    import specialised

    from interp_kernels import Mask, Received, Request, Rule, Steer
    from interp_kernels.call import prepare
    from interp_kernels.fused.decode import decode
    from interp_kernels.fused.forward import NAMES, Keys, forward
    from interp_kernels.fused.merge import Piece, merge
    from interp_kernels.fused.received import received

    def tensors(
        d: int, dtype: torch.dtype = torch.bfloat16, heads: int = 4
    ) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.zeros(1, 256, h, d, dtype=dtype).transpose(1, 2)
            for h in (heads, heads // 2, heads // 2)
        )

    def run(d: int = 128, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Callable[[], Any]:
        keys, names = kwargs.pop("keys", Keys()), kwargs.pop("names", ())
        settings = {
            name: kwargs.pop(name) for name in ("mask", "softcap", "sinks") if name in kwargs
        }
        labels = dict(labels=kwargs.pop("labels", None), n_groups=kwargs.pop("n_groups", 0))
        request, steer = Request(frozenset(names), **labels), Steer(**kwargs)

        def launch() -> Any:
            call = prepare(*tensors(d, dtype), steer=steer, scale=0.1, **settings)
            return forward(replace(call, request=request), keys, names)

        return launch

    labels = torch.zeros(1, 256, dtype=torch.int32)
    keep = Keys(torch.ones(1, 4, 256, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int32))
    lists = Keys(
        lists=torch.zeros(1, 4, 256, dtype=torch.int32),
        counts=torch.zeros(1, 4, dtype=torch.int32),
    )
    everything: dict[str, Any] = dict(names=NAMES, labels=labels, n_groups=8)

    def column(question: Received, **kwargs: Any) -> Callable[[], Any]:
        def launch() -> Any:
            q, k, _ = tensors(128)
            call = prepare(q, k, k, scale=0.1, **kwargs)
            return received(call, torch.zeros(1, 4, 256), question)

        return launch

    def step(steer: Steer | None = None, topk: int = 0) -> Callable[[], Any]:
        def launch() -> Any:
            q, k, v = tensors(128, heads=8)
            call = prepare(q[:, :, :1], k, v, mask=Mask(q_start=255), scale=0.1, steer=steer)
            return decode(call, topk=topk)

        return launch

    two = Rule(torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0]]))

    def merged(rule: Rule | None, gradients: bool = False) -> Callable[[], Any]:
        def launch() -> Any:
            out, _, v = tensors(128)
            pieces = [Piece(g, 0, out, torch.zeros(1, 4, 256)) for g in (0, 1)]
            gain = torch.ones(1, 4, 1)
            if rule is not None:
                rule.keep.requires_grad_(gradients)
            spans = () if rule is None else ((0, 1, 1),)
            call = prepare(out, v, v, steer=Steer(spans=spans, rule=rule, gain=gain))
            state = merge(pieces, call)
            return state.out.sum().backward() if gradients else state

        return launch

    return {
        "received": column(Received()),
        "received rows": column(Received(torch.ones(1, 256, dtype=torch.bool))),
        "received band": column(Received(band=(1, 50))),
        "received keys": column(Received(keys=torch.zeros(1, 1, 64, dtype=torch.int64))),
        "decode": step(),
        "decode rule, top-k": step(steer=Steer(spans=((0, 1, 1),), rule=two), topk=5),
        "merge": merged(two),
        "experiment, TMA": lambda: specialised.run("descriptors, two loops", *tensors(128), 0.1),
        "experiment, warps": lambda: specialised.run("warp-specialised", *tensors(128), 0.1),
        "merge with gradients": merged(two, gradients=True),
        "forward plain": run(),
        "forward plain d64": run(64),
        "forward plain d256": run(256),
        "forward plain d80": run(80),
        "forward plain fp16": run(dtype=torch.float16),
        "forward plain fp32": run(dtype=torch.float32),
        "forward window": run(mask=Mask(window=100)),
        "forward softcap": run(softcap=30.0),
        "forward entropy": run(names=["entropy"]),
        "forward max+argmax": run(names=["max", "argmax"]),
        "forward distances": run(names=["distance", "capped_distance"]),
        "forward group mass": run(names=["group_mass"], labels=labels, n_groups=8),
        "forward all": run(**everything),
        "forward all d64": run(64, **everything),
        "forward all d256": run(256, **everything),
        "forward all fp32": run(dtype=torch.float32, **everything),
        "forward keep": run(keys=keep),
        "forward listed": run(keys=lists),
        "forward bias": run(bias=torch.zeros(1, 1, 256)),
        "forward temper": run(temper=torch.zeros(1, 4, 256)),
        "forward sigmoid": run(sigmoid=-3.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the table there")
    parser.add_argument("--only", default="", help="only names that contain this")
    parser.add_argument("--capability", type=int, default=90)
    arguments = parser.parse_args()
    table = {}
    for name, launch in cases().items():
        if arguments.only in name:
            with compiling(arguments.capability) as found:
                launch()
            for kernel in found:
                row = read(kernel)
                table[name if len(found) == 1 else f"{name}: {row['kernel']}"] = row
                loops = ", ".join(f"{n} ({h} MMA)" for n, h in row["loops"] if h)
                print(
                    f"{name:24}{row['kernel']:18}{row['registers']:4} registers"
                    f"{row['spilled']:5} B spilled ({row['hot_spills']} hot)"
                    f"{row['shared']:8} B shared{row['hgmma']:4} HGMMA{row['warps']:3} warps; "
                    f"loops {loops}",
                    flush=True,
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
