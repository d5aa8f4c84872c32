"""Whole-model cost of looking at attention: this toolkit against plain SDPA, HF eager and
TransformerLens.

    python kernels/benchmarks/model.py --out kernels/benchmarks/results/cpu.json

Same weights, same inputs, one forward each, rounds interleaved, medians. "full" is entropy, max,
arg-max, distance, capped distance, 16 group masses and received; "cheap" is first-key mass and the
previous-token pair mass. Extra memory is the peak resident size during the forward minus the size
before it (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import interp
from interp_hooks import Question, hook
from interp_kernels import Received

FULL = frozenset({"entropy", "max", "argmax", "distance", "capped_distance", "group_mass"})


def random_llama() -> Any:
    """Width 512, 8 heads of 64, 4 layers, random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=16384,
    )
    return transformers.LlamaForCausalLM(config).eval()


def transformer_lens_model(module: Any) -> Any:
    """The same weights as a HookedTransformer (explicit config, converted weights)."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    c = module.config
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=16384,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_adjacent_pairs=False,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        eps=c.rms_norm_eps,
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_llama_weights(module, cfg), strict=False)
    return model.eval()


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(run: Callable[[], Any]) -> float:
    """Extra megabytes of one call. Writing 5 to clear_refs resets the kernel's high-water mark."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # else what earlier runs freed would be taken again unseen
    measurable = os.path.exists("/proc/self/clear_refs")
    if measurable:
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS") if measurable else 0.0
    result = run()
    extra = _status("VmHWM") - before if measurable else float("nan")
    del result
    return extra


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def ways(module: Any, length: int, lens: Any | None) -> dict[str, Callable[[], Any]]:
    """name → one forward."""
    hooked = hook(module, name="benchmark")
    ids = torch.randint(
        0, module.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length)
    )
    labels = (torch.arange(length) % 16)[None]
    full = Question(FULL, received={"all": Received()}, labels=labels, n_groups=16)
    slots = torch.arange(length)[None, :, None]
    cheap = Question(pairs={"first": torch.zeros(1, 1, 1, dtype=torch.long), "previous": slots - 1})

    def watched(question: Question) -> Callable[[], Any]:
        def run() -> None:
            kept = []  # statistics stay alive until the forward ends, as in a recording
            with hooked.watch(question, kept.append):
                module(ids, use_cache=False, logits_to_keep=1)

        return run

    def eager() -> Any:
        module.set_attn_implementation("eager")
        try:
            return module(ids, use_cache=False, logits_to_keep=1, output_attentions=True)
        finally:
            module.set_attn_implementation("sdpa")

    def plain() -> Any:
        return module(ids, use_cache=False, logits_to_keep=1)

    found: dict[str, Callable[[], Any]] = dict(
        plain=plain, cheap=watched(cheap), full=watched(full), eager=eager
    )
    if lens is not None:
        found["transformer_lens"] = lambda: lens.run_with_cache(ids, return_type=None)
    return found


@torch.no_grad()
def measure(
    name: str, module: Any, lengths: list[int], rounds: int, limit_gb: float
) -> list[dict[str, Any]]:
    lens = transformer_lens_model(module)
    c = module.config
    rows = []
    for length in lengths:
        square = (
            4 * c.num_attention_heads * length**2 * c.num_hidden_layers / 1e9
        )  # one fp32 pattern a layer, in GB
        runs = ways(module, length, lens)
        skipped = {}
        if 1.6 * square > limit_gb:
            skipped["eager"] = f"its patterns alone take {square:.1f} GB"
            runs.pop("eager")
        if 3.2 * square > limit_gb:
            skipped["transformer_lens"] = f"cached scores and patterns take {2 * square:.1f} GB"
            runs.pop("transformer_lens")
        # a first round for memory, which also warms up; then rounds for time
        memory = {key: peak(run) for key, run in runs.items()}
        times: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                times[key].append(timed(run))
        row: dict[str, Any] = dict(model=name, length=length, skipped=skipped)
        for key, values in times.items():
            row[key] = dict(
                seconds=round(statistics.median(values), 4), extra_mb=round(memory[key], 1)
            )
        plain = row["plain"]["seconds"]
        row["ratios"] = {
            f"{k} / plain": round(row[k]["seconds"] / plain, 2) for k in times if k != "plain"
        }
        if "eager" in row:
            row["ratios"]["eager / full"] = round(
                row["eager"]["seconds"] / row["full"]["seconds"], 2
            )
            row["ratios"]["full memory / eager memory"] = round(
                row["full"]["extra_mb"] / row["eager"]["extra_mb"], 3
            )
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="kernels/benchmarks/results/cpu.json")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--limit-gb", type=float, default=6, help="leave out runs whose patterns take more"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths = [int(n) for n in arguments.lengths.split(",")]
    rows = []
    for name, module in (
        ("pocket-llama", interp.load("llama").module),
        ("random Llama, width 512", random_llama()),
    ):
        rows += measure(name, module, lengths, arguments.rounds, arguments.limit_gb)
    result = dict(
        what=__doc__.split("\n\n")[2].replace("\n", " "),
        machine=f"{_cpu()}, {arguments.threads} threads",
        date=time.strftime("%Y-%m-%d"),
        versions={p: version(p) for p in ("torch", "transformers", "transformer-lens", "interp")},
        dtype="float32",
        rows=rows,
    )
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
