"""What a default scan of large models would take: docs/scale.md's tables, from their shapes.

    python examples/scale_table.py --page docs/scale.md --out examples/scale_table.json

Nothing is run but the cost model (`interp.scan_cost`). The shapes are those of Llama 3.1's three
sizes, as their configurations have them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import transformers

import interp
from interp.costs import machines
from interp.costs.shape import Shape, of_config, shape_of
from interp.support.progress import duration

BEGIN, END = "<!-- scale table: begin -->", "<!-- scale table: end -->"
#: name → width, MLP, layers, heads
SIZES = {
    "8B": (4096, 14336, 32, 32),
    "70B": (8192, 28672, 80, 64),
    "405B": (16384, 53248, 126, 128),
}
CONTEXTS = {"128k": 131072, "1M": 1048576}
MACHINES = {"8 H200": 8, "64 H200": 64}
CHUNK = 8192
SAMPLES = 16


def shape(name: str) -> Shape:
    """The sizes of a Llama 3.1."""
    width, mlp, layers, heads = SIZES[name]
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )
    return of_config(config, name)


def made() -> dict[str, Any]:
    """All rows, and a check of the CPU's fit against a model that it was not fitted to."""
    rows = []
    for name in SIZES:
        sizes = shape(name)
        for label, context in CONTEXTS.items():
            for where, gpus in MACHINES.items():
                for chunk in (None, CHUNK):
                    cost = interp.scan_cost(sizes, context, SAMPLES, gpus=gpus, chunk=chunk)
                    one = machines.h200().forward(sizes, context, watched=True)
                    said = cost.to_json()
                    rows.append(
                        dict(model=name, context=label, machine=where, chunk=chunk, one_text=one)
                        | {k: said[k] for k in said if k.startswith("bytes")}
                        | {k: said[k] for k in ("seconds", "copies", "gpus_a_copy")}
                    )
    speed = json.loads(Path(__file__).with_name("scan_speed.json").read_text())
    (text,) = (p for p in speed["parts"] if p["part"] == "text: plain")
    check = dict(
        model=speed["model"],
        tokens=speed["context"],
        told=machines.cpu().forward(shape_of(speed["model"]), speed["context"], watched=False),
        cpu_seconds=round(text["cpu_seconds"] / speed["samples"], 2),
        hardware=speed["hardware"],
    )
    return dict(
        date=time.strftime("%Y-%m-%d"),
        gpu=machines.h200().measured,
        cpu=machines.cpu().measured,
        memory_error=round(machines.working().error, 2),
        samples=SAMPLES,
        rows=rows,
        check=check,
    )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.0f}"


def between(ends: Any) -> str:
    low, high = map(duration, ends)
    return f"{low} – {high}"


def markdown(result: dict[str, Any]) -> str:
    """The tables, and on what they rest."""
    lines = [
        "| model | tokens | weights | cache | at work, at once | at work, chunks of "
        f"{CHUNK:,} | GPUs a copy (chunks) | one text, watched |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_key = {(r["model"], r["context"], r["machine"], r["chunk"]): r for r in result["rows"]}
    for name in SIZES:
        for context in CONTEXTS:
            whole = by_key[name, context, "8 H200", None]
            part = by_key[name, context, "8 H200", CHUNK]
            cells = [gigabytes(whole[f"bytes_{k}"]) for k in ("weights", "cache", "working")]
            lines.append(
                f"| {name} | {context} | {' | '.join(cells)} | {gigabytes(part['bytes_working'])} "
                f"| {part['gpus_a_copy']} (at once {whole['gpus_a_copy']}) "
                f"| {between(whole['one_text'])} |"
            )
    lines += ["", "| default scan, chunks | " + " | ".join(MACHINES) + " |", "|---|---|---|"]
    for name in SIZES:
        for context in CONTEXTS:
            cells = []
            for machine, gpus in MACHINES.items():
                row = by_key[name, context, machine, CHUNK]
                fits = row["gpus_a_copy"] <= gpus
                many = f"{row['copies']} cop{'y' if row['copies'] == 1 else 'ies'}"
                cells.append(f"{between(row['seconds'])}, {many}" if fits else "does not fit")
            lines.append(f"| {name}, {context} | {' | '.join(cells)} |")
    check = result["check"]
    lines += [
        "",
        f"{result['samples']} samples a score, bfloat16, gigabytes of 10⁹ bytes, {result['date']}. "
        f"GPU seconds are {result['gpu']}. What a forward works with is fitted to the CPU "
        f"benchmarks' (each told by the others within {result['memory_error']:.0%}). CPU seconds "
        f"are {result['cpu']}. A check on a model that is not among them: {check['model']}, "
        f"{check['tokens']:,} tokens, is told {check['told'][0]:.1f} to {check['told'][1]:.1f} s "
        f"on the benchmarks' two threads; {check['hardware']}, one thread, bfloat16, took "
        f"{check['cpu_seconds']} CPU seconds ([all numbers](../examples/scale_table.json)).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("scale_table.json"))
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    result = made()
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(result)
    print(table)
    if options.page:
        page = options.page.read_text(encoding="utf-8")
        head, rest = page.split(BEGIN)
        _, tail = rest.split(END)
        options.page.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
