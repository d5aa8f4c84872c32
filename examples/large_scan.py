"""The default scan of a model with three billion parameters on a machine without a GPU: what it
takes.

    python examples/large_scan.py --page docs/scale.md

The model is random, of Llama 3.2 3B's sizes, in bfloat16, so nothing is learned from its heads:
this measures memory and time. Beside the scan stands one plain forward of as many tokens, in a
process of its own (with transformers' sdpa, at once, and in chunks with a cache), for the peak of
each.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from published import parser, publish, stamp, where

import interp

BEGIN, END = "<!-- large scan: begin -->", "<!-- large scan: end -->"
#: of Llama 3.2 3B
SIZES: dict[str, Any] = dict(
    vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
    num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    max_position_embeddings=131072,
)  # fmt: skip
#: the issue's bar
BAR_GB = 20.0


def built() -> Any:
    """The random model."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, rope_parameters=dict(rope_type="default", rope_theta=500000.0))
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def peak() -> float:
    """Gigabytes of this process at most so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


@torch.no_grad()
def part(what: str, options: Any) -> dict[str, Any]:
    """One measurement, in this process."""
    module = built()
    loaded, tokens = peak(), options.tokens
    found: dict[str, Any] = dict(what=what, parameters=sum(p.numel() for p in module.parameters()))
    began = time.perf_counter()
    if what.startswith("plain"):
        ids = torch.arange(tokens)[None] * 37 % SIZES["vocab_size"]
        step, cache = (options.chunk if "chunks" in what else tokens), None
        for start in range(0, tokens, step):
            out = module(ids[:, start : start + step], past_key_values=cache, logits_to_keep=1)
            cache = out.past_key_values
    else:
        model = interp.load(module, tokenizer=interp.load("llama").tokenizer)
        chunk = options.chunk if "chunks" in what else None
        began = time.perf_counter()
        atlas = interp.scan_heads(model, context=tokens, samples=1, chunk=chunk, progress=False)
        found["scores"] = list(atlas.scores)
    return found | dict(
        seconds=round(time.perf_counter() - began, 1), loaded_gb=loaded, peak_gb=peak()
    )


PARTS = ("plain forward", "plain forward in chunks", "default scan", "default scan in chunks")


def render(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | seconds | GB, model loaded | GB at most |", "|---|---|---|---|"]
    for row in result["parts"]:
        numbers = f"{row['seconds']:.0f} | {row['loaded_gb']:.1f} | {row['peak_gb']:.1f}"
        lines.append(f"| {row['what']} | {numbers} |")
    about = (
        f"{result['parts'][0]['parameters'] / 1e9:.1f} billion random parameters, bfloat16; "
        f"{result['tokens']:,} tokens, one sample, chunks of {result['chunk']:,}; a process each; "
        f"{where([result])} ([all numbers](../examples/large_scan.json))."
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    made = parser(__doc__, "large_scan", 1)
    made.add_argument("--tokens", type=int, default=4096)
    made.add_argument("--chunk", type=int, default=1024)
    made.add_argument("--part", choices=PARTS, help="one of them, in this process")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    if options.part:
        print(json.dumps(part(options.part, options)))
        return
    rows = []
    for what in PARTS:
        command = [sys.executable, __file__, "--part", what, f"--tokens={options.tokens}"]
        command += [f"--chunk={options.chunk}", f"--threads={options.threads}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    result = dict(parts=rows, tokens=options.tokens, chunk=options.chunk, bar_gb=BAR_GB, **stamp())
    publish(result, render(result), options, BEGIN, END)


if __name__ == "__main__":
    main()
