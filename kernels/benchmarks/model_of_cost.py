"""How fast a forward should be on an H100, on paper: from the instructions that it compiled to.

    python kernels/benchmarks/model_of_cost.py [--page docs/kernels.md]

A tile of `rows` queries and `cols` keys takes, in clocks of one of a multiprocessor's four
schedulers,

    products = 4·rows·cols·D / 4096            the tensor cores, FLOP a clock
    softmax  = max(loop · warps / 4, rows·cols / 16)    an instruction a clock; exponentials
    T = products + softmax − ω · min(products, softmax)

where `loop` is the length of the hot loop in machine code (`compiled.py`) and ω how much of the
shorter one hides behind the longer. Clocks are those at which a large product reaches 788 TFLOP/s.
ω is taken from published kernels of known speed at 128 dimensions, one for each way in which warps
work, with the softmax of our plain kernel for theirs, which computes the same; how well they then
tell kernels of 64 dimensions is the model's error. No GPU was used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

RESULTS = HERE / "results" / "compiled" / "kernels.json"
BEGIN, END = "<!-- model of cost: begin -->", "<!-- model of cost: end -->"
#: FLOP a clock of a multiprocessor's tensor cores, 16-bit; exponentials a clock.
TENSOR, EXPONENTIALS = 4096, 16
#: Multiprocessors of an H100, and clocks a second at which large products reach 788 TFLOP/s.
PROCESSORS = 132
CLOCK = 788e12 / (TENSOR * PROCESSORS)
#: Ways in which warps work: all do everything; some copy and two groups compute; two groups
#: compute, and each has the next products under way in its softmax.
ALIKE, SPECIALISED, PIPELINED = "alike", "specialised", "pipelined"


@dataclass(frozen=True)
class Published:
    """A forward of 16,384 tokens (8,192 where `at` says so) on an H100, 16 bits, no mask."""

    name: str
    dim: int
    how: str
    tflops: float
    source: str


PUBLISHED = (
    Published("Triton's tutorial", 128, ALIKE, 487, "facebookexperimental/triton #205"),
    Published("Triton's tutorial", 128, ALIKE, 477, "pytorch/benchmark #2391"),
    Published("TLX, specialised", 128, SPECIALISED, 502, "facebookexperimental/triton #205"),
    Published(
        "FlashAttention-3 without pipelining", 128, SPECIALISED, 582, "arXiv 2407.08608, 4.2"
    ),
    Published("TLX, pipelined", 128, PIPELINED, 612, "facebookexperimental/triton #206"),
    Published("FlashAttention-3", 128, PIPELINED, 648, "arXiv 2407.08608, chart"),
    Published("FlashAttention-3", 128, PIPELINED, 621, "pytorch/benchmark #2391"),
    Published("Triton's tutorial", 64, ALIKE, 403, "arXiv 2407.08608, chart"),
    Published("FlashAttention-3", 64, PIPELINED, 497, "arXiv 2407.08608, chart"),
)


@dataclass(frozen=True)
class Tile:
    """What a tile takes, in clocks, and its FLOP."""

    products: float
    softmax: float
    flop: float

    def tflops(self, hidden: float) -> float:
        """Speed where a share `hidden` (ω) of the shorter part hides behind the longer."""
        clocks = self.products + self.softmax - hidden * min(self.products, self.softmax)
        return self.flop / clocks * CLOCK * PROCESSORS / 1e12

    def hidden(self, tflops: float) -> float:
        """ω at which a speed comes out."""
        clocks = self.flop * CLOCK * PROCESSORS / (tflops * 1e12)
        return (self.products + self.softmax - clocks) / min(self.products, self.softmax)


def tile(rows: int, cols: int, dim: int, loop: int, warps: int = 8) -> Tile:
    """The tile of `warps` warps that compute, `loop` instructions each."""
    flop = 4.0 * rows * cols * dim
    softmax = max(loop * warps / 4, rows * cols / EXPONENTIALS)
    return Tile(flop / TENSOR, softmax, flop)


def ours(compiled: dict[str, Any]) -> dict[tuple[str, int], tuple[str, Tile]]:
    """(what, head dimension) → how its warps work, and its tile."""
    from interp_kernels.fused import configs

    found = {}
    for dim in (128, 64):
        plain, _, counted = configs._FORWARD[90][dim]
        for what, label, one in (
            ("plain", "forward plain", plain),
            ("entropy, max, arg-max", "forward few statistics", counted),
            ("all statistics", "forward all", counted),
        ):
            loop = compiled[f"{label} d{dim}"]["loop"]
            found[what, dim] = ALIKE, tile(one.rows, one.cols, dim, loop, one.warps)
        for what, label in (("plain", "plain"), ("entropy, max, arg-max", "statistics")):
            for one in configs.SPECIALISED:
                loop = compiled[f"specialised {label}, {one.cols} keys d{dim}"]["loop"]
                name = f"{what}, warps specialised, {one.cols} keys"
                found[name, dim] = SPECIALISED, tile(one.rows, one.cols, dim, loop)
    return found


def overlaps(tiles: dict[tuple[str, int], tuple[str, Tile]]) -> dict[str, list[float]]:
    """way → ω of each published kernel of 128 dimensions."""
    found: dict[str, list[float]] = {}
    for one in PUBLISHED:
        if one.dim == 128:
            found.setdefault(one.how, []).append(tiles["plain", 128][1].hidden(one.tflops))
    return found


def checked(tiles: dict[tuple[str, int], tuple[str, Tile]]) -> list[tuple[Published, float]]:
    """Published kernels of other dimensions, and what the model tells of them."""
    hidden = {how: statistics.median(all_) for how, all_ in overlaps(tiles).items()}
    return [
        (one, tiles["plain", one.dim][1].tflops(hidden[one.how]))
        for one in PUBLISHED
        if one.dim != 128
    ]


def markdown() -> str:
    """The tables of docs/kernels.md."""
    tiles = ours(json.loads(RESULTS.read_text())["families"]["90"])
    found = overlaps(tiles)
    lines = ["| published, 128 dimensions | TFLOP/s | ω |", "|---" * 3 + "|"]
    for one in PUBLISHED:
        if one.dim == 128:
            omega = tiles["plain", 128][1].hidden(one.tflops)
            shown = f"{omega:.2f}".replace("-", "−")
            lines.append(f"| {one.name} ({one.source}) | {one.tflops:.0f} | {shown} |")
    lines += ["", "| check, 64 dimensions | published | told |", "|---" * 3 + "|"]
    for one, told in checked(tiles):
        off = signed(told / one.tflops)
        lines.append(f"| {one.name} ({one.source}) | {one.tflops:.0f} | {told:.0f} ({off}) |")
    head = "| ours, not measured | D | products | softmax | TFLOP/s, least to most ω of its way |"
    lines += ["", head, "|---" * 5 + "|"]
    for (what, dim), (how, one) in tiles.items():
        low, high = (one.tflops(end(found[how])) for end in (min, max))
        clocks = f"{one.products:.0f} | {one.softmax:.0f}"
        lines.append(f"| {what} | {dim} | {clocks} | {low:.0f} to {high:.0f} |")
    return "\n".join(lines)


def signed(ratio: float) -> str:
    """ "−11 %"."""
    return f"{100 * (ratio - 1):+.0f} %".replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="a page to put the tables into")
    page = parser.parse_args().page
    if page is None:
        print(markdown())
        return
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    filled = f"{head}{BEGIN}\n{markdown()}\n{END}{rest.split(END)[1]}"
    page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
