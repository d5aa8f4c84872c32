"""What pocket-whisper's cross-attention and attributions say of the sound, beside where notes lie.

    python examples/speech_checks.py --n 32

Prints tables of docs/methods.md. Melodies are of seeds that training never saw.
"""

from __future__ import annotations

import argparse
from math import ceil
from typing import Any

import interp
from interp import scenes
from interp.mechanics.saliency import SALIENCIES

HELD_OUT = 10_000_000
#: positions of the encoder a second
RATE = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=32, help="melodies")
    n = parser.parse_args().n
    model = interp.load("whisper")
    melodies = [scenes.melody(HELD_OUT + i) for i in range(n)]
    heard = [
        model.processor(scenes.waveform(m), sampling_rate=scenes.RATE, return_tensors="pt")
        for m in melodies
    ]
    targets = [model.tokenizer(m.text).input_ids for m in melodies]
    spans = [[(int(s.start * RATE), ceil(s.end * RATE)) for s in m.notes] for m in melodies]
    for of in ("input", "encoder"):
        frame = interp.mechanics.cross_agreement(
            model, heard, targets, of=of, spans=spans, progress=True
        )
        if of == "input":
            shares = ", ".join(f"L{r.layer}H{r.head} {r.on_span:.2f}" for r in frame.itertuples())
            print(f"attention on the told note: {shares}")
        print(f"\nattribution to the {of}; an even map has {frame.attrs['span']['even']:.2f}\n")
        print("| | on the told note | all heads | another melody's | best head | worst head |")
        print("|---|---|---|---|---|---|")
        for name in SALIENCIES:
            column = f"pearson_{name}"
            row: dict[str, Any] = {k: frame.attrs[k][column] for k in ("all", "shuffled")}
            heads = frame.sort_values(column)
            ends = [f"L{heads.layer.iloc[i]}H{heads['head'].iloc[i]} {heads[column].iloc[i]:.2f}"
                    for i in (-1, 0)]  # fmt: skip
            print(
                f"| {name} | {frame.attrs['span'][name]:.2f} | {interval(row['all'])} | "
                f"{interval(row['shuffled'])} | {ends[0]} | {ends[1]} |"
            )


def interval(found: dict[str, float]) -> str:
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


if __name__ == "__main__":
    main()
