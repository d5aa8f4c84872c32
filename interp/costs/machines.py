"""How fast a kind of machine runs a model: fitted to committed benchmarks, or, where nothing was
measured on it, between what the hardware allows and what the benchmarks ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from interp.costs.benchmarks import NOT_MEASURED, committed, read
from interp.costs.fit import Fit, fit
from interp.costs.shape import Shape, shape_of
from interp.errors import OutputError
from interp.scan.evidence import PACE

#: bytes of an H200, of which so much can be filled
H200, FILLED = 141e9, 0.9
#: what a forward reaches of the hardware's ceilings at worst, where nothing was measured: an
#: assumption
SHARE = 0.4
#: what a watched forward costs beside a plain one at worst, where nothing was measured: the bar of
#: kernels/benchmarks/longcontext.py
BAR = 3.0


#: features of a forward → (seconds at least, at most)
Seconds = Callable[[list[float]], tuple[float, float]]


@dataclass(frozen=True)
class Machine:
    """A machine of a kind.

    Attributes:
        name: what it is. measured: what the seconds rest on, as a sentence.
        memory: bytes that can be filled; None where nobody says.
        plain, watched: (seconds at least, at most) of a forward, by its features.
        rates: products of matrices of weights a second, at most and at least.
        bandwidth: bytes a second; 0 where nobody says.
    """

    name: str
    measured: str
    memory: float | None
    plain: Seconds
    watched: Seconds
    rates: tuple[float, float]
    bandwidth: float = 0.0

    def forward(self, shape: Shape, tokens: int, watched: bool) -> tuple[float, float]:
        """Seconds of one forward over a text, at least and at most."""
        return (self.watched if watched else self.plain)(features(shape, tokens))

    def step(self, shape: Shape, cached: int, held: float) -> tuple[float, float]:
        """Seconds of one watched decode step, which reads the `held` bytes of weights and cache."""
        weights = float(shape.heads * shape.layers * cached)
        row = [2.0 * shape.products, 4.0 * shape.d_head * weights, weights, float(shape.layers)]
        low, high = self.watched(row)
        if not self.bandwidth:
            return low, high
        read = held / self.bandwidth
        return max(low, read), max(high, read / SHARE)

    def products(self, count: float) -> tuple[float, float]:
        """Seconds of so many multiplications and additions of matrices of weights."""
        return count / self.rates[0], count / self.rates[1]


def features(shape: Shape, tokens: int) -> list[float]:
    """What a forward's time grows with: operations of the products with weights, operations of
    attention, weights of attention, tokens through layers."""
    pairs = shape.pairs(tokens)
    return [
        2.0 * shape.products * tokens,
        4.0 * shape.d_head * pairs,
        pairs,
        float(tokens * shape.layers),
    ]


def working_features(shape: Shape, tokens: int) -> list[float]:
    """What a forward's memory beside weights grows with: numbers of all heads, and of the MLP."""
    return [float(tokens * shape.heads * shape.d_head), float(tokens * shape.d_mlp)]


@cache
def cpu() -> Machine:
    """The CPU of `cpu.json`. Raises `OutputError` where it is missing."""
    result = _result("cpu")
    rows = [(_benchmarked(r["model"]), int(r["length"]), r) for r in result["rows"]]
    x = [features(shape, length) for shape, length, _ in rows]
    plain = fit(x, [r["plain"]["seconds"] for _, _, r in rows])
    watched = fit(x, [r["full"]["seconds"] for _, _, r in rows])
    lengths = [length for _, length, _ in rows]
    worst, typical = max(plain.error, watched.error), max(plain.typical, watched.typical)
    said = (
        f"fitted to {plain.n} forwards of two small models at {min(lengths):,} to "
        f"{max(lengths):,} tokens ({result['date']}), each told by the others within {worst:.0%} "
        f"(median {typical:.0%}); larger models and longer texts are extrapolated, and decode "
        "steps count by their arithmetic alone"
    )
    return Machine(result["machine"], said, None, _around(plain), _around(watched), (PACE, PACE))


@cache
def h200() -> Machine:
    """An NVIDIA H200. Raises `OutputError` where its results are missing."""
    result = _result("h200_model")
    rate = float(result["ceilings"]["tflops"]) * 1e12
    bandwidth = float(result["ceilings"]["tb_s"]) * 1e12
    rates = rate / 2, PACE  # an operation is a multiplication or an addition
    done = [r for r in result["rows"] if r["measured"] != NOT_MEASURED and "ms" in r]
    by_name = {name: [r for r in done if r["name"] == name] for name in ("plain", "head scan")}
    if all(len(rows) > 1 for rows in by_name.values()):
        shape = _benchmarked("8b")
        fits = {}
        for name, rows in by_name.items():
            x = [features(shape, int(r["length"]))[:2] for r in rows]
            fits[name] = fit(x, [r["ms"] / 1000 for r in rows])
        said = f"fitted to forwards of an 8B shape ({result['date']})"
        plain, watched = (_around(fits[n], columns=2) for n in by_name)
        return Machine(result["gpu"], said, H200 * FILLED, plain, watched, rates, bandwidth)

    def of(times: float) -> Seconds:
        def seconds(row: list[float]) -> tuple[float, float]:
            best = (row[0] + row[1]) / rate
            return best, best / SHARE * times

        return seconds

    said = (
        f"not measured: from {rate / 1e12:.0f} TFLOP/s, all of them, to {SHARE:.0%} of them and "
        f"statistics at {BAR:g} times the plain forward"
    )
    return Machine(result["gpu"], said, H200 * FILLED, of(1.0), of(BAR), rates, bandwidth)


@cache
def working() -> Fit:
    """Numbers (of 4 bytes) that a watched forward holds beside the weights, from `cpu.json`."""
    rows = [(_benchmarked(r["model"]), int(r["length"]), r) for r in _result("cpu")["rows"]]
    x = [working_features(shape, length) for shape, length, _ in rows]
    return fit(x, [r["full"]["extra_mb"] * 1e6 / 4 for _, _, r in rows])


def _around(found: Fit, columns: int | None = None) -> Seconds:
    """(at least, at most) of a fit, by its largest error."""

    def seconds(row: list[float]) -> tuple[float, float]:
        middle = found(row[:columns])
        error = min(found.error, 0.9) if found.error == found.error else 0.5  # NaN: too few
        return middle * (1 - error), middle * (1 + error)

    return seconds


@cache
def _benchmarked(name: str) -> Shape:
    """The sizes of the models that benchmarks run, which stand in their scripts. Raises
    `OutputError` for another one."""
    import transformers

    from interp.costs.shape import of_config

    if name == "pocket-llama":
        return shape_of(name)
    sizes = {  # kernels/benchmarks/model.py, longcontext.py
        "random Llama, width 512": (1024, 512, 1536, 4, 8, 8),
        "8b": (128256, 4096, 14336, 32, 32, 8),
    }
    if name not in sizes:
        raise OutputError(f"The sizes of the benchmark's model {name!r} are not known here.")
    words, width, mlp, layers, heads, kv = sizes[name]
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
    )
    return of_config(config, name)


def _result(name: str) -> dict[str, Any]:
    folder = committed()
    return read((folder or Path("kernels/benchmarks/results")) / f"{name}.json")
