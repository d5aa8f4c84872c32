"""Looking at every head of a Llama-3.1-8B-shaped model with random weights, at long context, on a
GPU.

    python kernels/benchmarks/longcontext.py [--lengths 8192,32768,131072] [--layers 32] [--only
    NAME] [--again]

A row is written when it is measured; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import record
import torch
import transformers
from record import NO_GPU, Record, Row, planned
from torch.nn.attention import SDPBackend, sdpa_kernel

from interp_hooks import HookedModel, LayerStats, Question, hook
from interp_kernels import Received

WHAT = (
    "One forward of a Llama-3.1-8B-shaped model (32 query and 8 key-value heads of dimension 128, "
    "width 4096, random "
    "bf16 weights), batch 1, no cache, logits of the last token: plain (transformers' sdpa) and "
    "while every layer's "
    "statistics are computed and reduced to means a head. cheap: first-key and previous-token "
    "mass; full: entropy, "
    "max, arg-max, distance, capped distance, 16 group masses and received; head scan: entropy, "
    "max, arg-max, "
    "distance, received, received within ten tokens, first-key, previous-token and induction mass. "
    "ms is the median of "
    "two forwards after a short one. Extra peak memory is that of the forward over the plain "
    "forward's, as a share of "
    "the latter's whole peak, weights included."
)
GROUPS = 16
PLAIN, SCAN = "plain", "head scan"
LENGTHS = (8192, 32768, 131072)
#: The length whose ratios have bars.
BARRED = 131072
MEMORY = "extra peak memory: "
WATCHED = ("cheap statistics", "full statistics", SCAN)
#: Tokens of the forward that compiles and warms up.
WARM_UP = 512


def plan(lengths: list[int], smoke: bool) -> list[Row]:
    """Rows in the order of measuring; a memory row is filled together with its time."""
    rows = []
    for length in lengths:
        barred = length == BARRED or smoke
        rows += [planned(PLAIN, length), planned("plain, cuDNN forced", length, PLAIN)]
        for name in WATCHED:
            bars = (3.0, 1.8) if barred and name == SCAN else (None, None)
            rows.append(planned(name, length, PLAIN, *bars))
            bars = (0.05, 0.01) if barred and name != WATCHED[0] else (None, None)
            rows.append(planned(MEMORY + name, length, PLAIN, *bars))
    return rows


def build(layers: int, length: int, device: torch.device, smoke: bool) -> Any:
    """The model, its weights made where they stay."""
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2 * length,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
        attn_implementation="sdpa",
    )
    if smoke:
        config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim = (
            101,
            64,
            128,
            16,
        )
        config.num_attention_heads, config.num_key_value_heads = 4, 2
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def question(name: str, length: int, device: torch.device) -> Question:
    """What is asked of every layer."""
    slots = torch.arange(length, device=device)[None, :, None]
    first, previous = torch.zeros(1, 1, 1, dtype=torch.long, device=device), slots - 1
    if name == "cheap statistics":
        return Question(pairs={"first": first, "previous": previous})
    if name == "full statistics":
        names = frozenset({"entropy", "max", "argmax", "distance", "capped_distance", "group_mass"})
        labels = (torch.arange(length, device=device) % GROUPS)[None]
        return Question(names, received={"all": Received()}, labels=labels, n_groups=GROUPS)
    half = length // 2  # text that repeats once: the token after the earlier occurrence
    induction = torch.where(slots >= half, slots - half + 1, -1)
    return Question(
        frozenset({"entropy", "max", "argmax", "distance"}),
        {"first": first, "previous": previous, "induction": induction},
        {"all": Received(), "near": Received(band=(0, 9))},
    )


def reduce(stats: LayerStats) -> dict[str, torch.Tensor]:
    """Means a head; nothing as long as the context stays."""
    found = {name: value.float().mean(2) for name, value in stats.rows.items()}
    found |= {name: value.mean(2) for name, value in stats.pair_mass.items()}
    return found | {f"received:{name}": value.amax(-1) for name, value in stats.received.items()}


def forward(model: HookedModel, name: str, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """One forward of one kind; what was seen of each layer."""
    kept: list[dict[str, torch.Tensor]] = []
    arguments = dict(input_ids=ids, use_cache=False, logits_to_keep=1)
    if name not in WATCHED:
        forced = name != PLAIN and ids.is_cuda
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if forced else nullcontext():
            model.module(**arguments)
        return kept
    with model.watch(
        question(name, ids.shape[1], ids.device), lambda stats: kept.append(reduce(stats))
    ):
        model.module(**arguments)
    return kept


def measured(run: Callable[[], Any], device: torch.device) -> tuple[list[float], int]:
    """(milliseconds of two calls, peak bytes); on a CPU one call and no peak."""
    if device.type != "cuda":
        return record.timed(run, device), 0
    times, peak = [], 0
    for _ in range(2):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end))
        peak = max(peak, torch.cuda.max_memory_allocated(device))
    return times, peak


def floor_ms(config: Any, length: int, floors: tuple[float, float]) -> float:
    """FLOPs of a plain forward (products with the weights, causal attention) or its weights' bytes,
    at the ceilings."""
    c = config
    per_layer = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    weights = c.num_hidden_layers * (per_layer + 3 * c.hidden_size * c.intermediate_size)
    square = c.num_hidden_layers * 2.0 * length**2 * c.head_dim * c.num_attention_heads
    return 1e3 * max((2.0 * weights * length + square) / floors[0], 2.0 * weights / floors[1])


@torch.no_grad()
def measure_all(
    book: Record,
    lengths: list[int],
    only: str,
    layers: int,
    device: torch.device,
    smoke: bool,
    end: float,
) -> int:
    """Measure what is missing until the clock says `end`; how many rows are left."""
    names = (PLAIN, "plain, cuDNN forced", *WATCHED)
    todo = [(n, name) for n in lengths for name in names if only in name and book.todo(name, n)]
    if not todo:
        return 0
    floors, left = record.ceilings(device), 0
    model = hook(build(layers, max(lengths), device, smoke), name="benchmark")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, model.module.config.vocab_size, (1, max(lengths)), generator=generator
    ).to(device)
    for length, name in todo:
        if time.time() > end:
            left += 1
            continue
        with record.recorded(book, name, length) as found:
            seen = forward(model, name, ids[:, : min(WARM_UP, length)])
            if name in WATCHED and len(seen) != layers:
                raise AssertionError(f"{len(seen)} of {layers} layers were seen")
            times, peak = measured(
                lambda name=name, length=length: forward(model, name, ids[:, :length]), device
            )
            found |= record.figures(times)
            found["floor_ms"] = round(floor_ms(model.module.config, length, floors), 3)
            found["peak_gb"] = round(peak / 1e9, 4)
        for watched in WATCHED if name == PLAIN else (name,):
            memory(book, watched, length)
    return left


def memory(book: Record, name: str, length: int) -> None:
    """The memory row of a watched forward, from its peak and the plain one's."""
    row, plain = book.rows.get((name, length)), book.rows[PLAIN, length]
    if name not in WATCHED or row is None or row["measured"] == record.NOT_MEASURED:
        return
    if not row.get("peak_gb") or not plain.get("peak_gb"):
        reason = row.get("error") or plain.get("error") or "there is no peak of both forwards"
        book.put(MEMORY + name, length, measured="skipped", error=reason)
        return
    extra = row["peak_gb"] - plain["peak_gb"]
    ratio = round(max(0.0, extra) / plain["peak_gb"], 4)
    book.put(MEMORY + name, length, measured=row["measured"], ratio=ratio, extra_gb=round(extra, 4))
    print(record.line(book.rows[MEMORY + name, length]), flush=True)


def header(gpu: str, layers: int, floors: tuple[float, float], done: bool) -> Row:
    """All of a result but the rows."""
    return dict(
        what=WHAT,
        gpu=gpu,
        date=time.strftime("%Y-%m-%d") if done else record.NOT_MEASURED,
        revision=record.revision() if done else None,
        versions=record.versions() if done else {},
        shape=dict(layers=layers),
        ceilings=dict(tflops=floors[0] / 1e12, tb_s=floors[1] / 1e12),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument(
        "--out", help="the result file (default: in $OUT, else in results/ beside this)"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure also what is measured already"
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="start no further row after so long"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="everything once, tiny; runs without a GPU"
    )
    parser.add_argument(
        "--plan", action="store_true", help="write the rows with no figure, and measure nothing"
    )
    arguments = parser.parse_args()
    lengths, layers = [int(n) for n in arguments.lengths.split(",")], arguments.layers
    if arguments.plan:
        head = header("NVIDIA H200", layers, record.CEILINGS["h200"], False)
        text = record.dumps({**head, "rows": plan(lengths, False)})
        print(text, end="") if not arguments.out else Path(arguments.out).write_text(
            text, encoding="utf-8"
        )
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not arguments.smoke:
        print(NO_GPU, file=sys.stderr)
        raise SystemExit(2)
    if arguments.smoke:
        lengths, layers = [200], 2
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (smoke test)"
    path, earlier = record.place(
        "model_smoke" if arguments.smoke else "model", device, arguments.out
    )
    head = header(gpu, layers, record.ceilings(device), True)
    book = Record(
        path,
        head,
        plan(lengths, arguments.smoke),
        record.digest(__file__),
        earlier,
        arguments.again,
    )
    end = time.time() + 60 * arguments.minutes
    left = measure_all(book, lengths, arguments.only, layers, device, arguments.smoke, end)
    book.write()
    print(record.summary(book), path)
    if left:
        print(f"{left} left; the same command goes on.")


if __name__ == "__main__":
    main()
