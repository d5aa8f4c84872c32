"""Measures SmolLM2 (and smol-llava) for the catalogue's pages, into measured.json beside this file.

    python docs/site/measure.py FOLDER [scans] [circuits] [tasks] [sentence]

One scan, method or task alone is measured by its name, as scans:weights, circuits:relp, tasks:niah,
and the others stay. Scans are kept in FOLDER, so that a run that was interrupted goes on; the other
parts take minutes. The models come from the cache (`interp
models get smol-llava`). Each part replaces its own share of the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import interp

OUT = Path(__file__).with_name("measured.json")
TEXT, EYE = "smollm2-135m", "smol-llava"
#: folder → (model, scores, settings)
SCANS: dict[str, tuple[str, str, dict[str, int]]] = {
    "text": (
        TEXT,
        "all,-importance,-successor,-copy_suppression,-cri,-function_vector,-receiver,-in_context,"
        "-ships,-ships_excess",
        dict(context=1024, samples=16),
    ),
    "weights": (TEXT, "successor,copy_suppression", dict(context=64, samples=1)),
    "sentences": (TEXT, "receiver", dict(context=1024, samples=16)),
    "causal": (TEXT, "cri,function_vector,in_context", dict(context=256, samples=8)),
    "safety": (TEXT, "ships,ships_excess", dict(context=64, samples=8)),
    "image": (
        EYE,
        "vhd,gaze,image_retrieval,image_mass,image_excess,visual_sink,visual_nonsink_ratio,"
        "image_centric,cls_outlier,vit_distance,vit_importance",
        dict(samples=16),
    ),
    "importance": (TEXT, "importance", dict(context=128, samples=2)),
}
#: methods that take minutes; ACDC takes days
METHODS = (
    "attribution", "eap", "relp", "gim", "hisp", "atp_star", "eap_ig", "discrete_sae",
    "attribution_by_code", "path_patching", "head_gating", "head_ablation",
)  # fmt: skip
PAIRS, PROBLEMS, SEED = 32, 32, 0
HEAD = "L18H6"
SENTENCE = (
    "The secret code of Paris is apple river stone. The weather was fine that day. "
    "The secret code of Paris is"
)


def main() -> None:
    folder, *parts = sys.argv[1:]
    record = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    for part in parts or PARTS:
        name, _, only = part.partition(":")
        for found in PARTS[name](Path(folder), *([only] if only else ())):
            for key, value in found.items():
                record[key] = {**record[key], **value} if only else value
            OUT.write_text(_compact(record), encoding="utf-8")


def scans(folder: Path, only: str | None = None) -> Iterator[dict[str, Any]]:
    """Scores of all heads."""
    made: dict[str, Any] = {"scans": {}, "scores": {}}
    for name, (model, scores, settings) in SCANS.items():
        if only not in (None, name):
            continue
        if not (folder / name / "atlas.json").is_file():
            interp.scan_heads(model, scores, out=folder / name, progress=False, **settings)
        atlas = interp.Atlas.load(folder / name)
        origin = atlas.provenance.get("origin") or {}
        made["scans"][name] = {
            "model": model,
            "date": atlas.provenance["created"][:10],
            "weights": _weights(origin),
            **_machine(),
        }
        for score in atlas.scores:
            tower, kind = atlas.panels(score)[0]
            matrix = atlas.matrix(score, tower, kind)
            if np.ma.count(matrix):
                made["scores"][score] = {
                    "scan": name,
                    "tower": tower,
                    "measured": str(atlas.measured(score)),
                    "values": _rounded(matrix.filled(np.nan)),
                }
    if only is not None:
        yield made
        return
    config = interp.load(TEXT, device="cpu").module.config
    made["query_heads"] = config.num_attention_heads // config.num_key_value_heads
    yield made


def circuits(folder: Path, only: str | None = None) -> Iterator[dict[str, Any]]:
    """The heads that each method finds for IOI."""
    model = interp.load(TEXT, device="cpu")
    made: dict[str, Any] = {}
    for name in [only] if only else METHODS:
        circuit = interp.circuits.find(model, "ioi", name, n=PAIRS, seed=SEED)
        signed = f"{name}_effect" in circuit.frame
        column = f"{name}_effect" if signed else name
        frame = circuit.frame.pivot(index="layer", columns="head", values=column)
        made[name] = {
            "signed": signed,
            "values": _rounded(frame.to_numpy(dtype=float)),
            "model": TEXT,
            "n": PAIRS,
            "seed": SEED,
            "date": str(date.today()),
            **_machine(),
        }
        print(name, circuit.heads(5), flush=True)
        yield {"circuits": made}


def tasks(folder: Path, only: str | None = None) -> Iterator[dict[str, Any]]:
    """How many problems the untouched model solves."""
    made: dict[str, Any] = {}
    for name in [only] if only else interp.tasks.names():
        task = interp.tasks.get(name)
        model = EYE if name in ("pope", "chair") else TEXT
        n = 16 if name == "niah" else PROBLEMS
        try:
            found = interp.evaluate(model, name, n=n, seed=SEED, force=True)
        except interp.InterpError as reason:
            print(name, reason, flush=True)
            continue
        settings = found.provenance["settings"].get("task_settings") or {}
        made[name] = {
            "model": model,
            "metric": found.metric,
            "mean": round(found.baseline.mean, 4),
            "low": round(found.baseline.low, 4),
            "high": round(found.baseline.high, 4),
            "n": n,
            "chance": round(float(getattr(task, "chance", 0.0)), 4),
            "format": settings.get("format") or "bare",
            "date": str(date.today()),
            **_machine(),
        }
        print(name, made[name], flush=True)
        yield {"tasks": made}


def sentence(folder: Path) -> Iterator[dict[str, Any]]:
    """Where a head looks from the last token of the start page's sentence."""
    model = interp.load(TEXT, device="cpu")
    weights = model.attention(SENTENCE, HEAD)[-1]
    pieces = model.look(SENTENCE, HEAD).tokens
    shares = [round(float(w), 3) for w in weights]
    yield {"sentence": {"head": HEAD, "tokens": pieces, "weights": shares}}


PARTS = {"scans": scans, "circuits": circuits, "tasks": tasks, "sentence": sentence}


def _machine() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    return {"hardware": f"{name}, threads: {torch.get_num_threads()}"}


def _weights(origin: dict[str, Any]) -> str:
    own = origin.get("language_model", origin)  # smol-llava's is SmolLM2
    return str(own.get("weights") or "as the hub has them")


def _rounded(values: np.ndarray) -> list[list[float | None]]:
    """Three significant digits; None for what was not measured."""
    return [[None if np.isnan(v) else float(f"{v:.3g}") for v in row] for row in values]


def _compact(record: dict[str, Any]) -> str:
    """JSON with a line a score, so that a change is readable."""
    lines = []
    for key, value in record.items():
        if isinstance(value, dict) and key in ("scores", "circuits", "tasks", "scans"):
            rows = (
                f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False, separators=(',', ':'))}"
                for k, v in value.items()
            )
            lines.append(f"{json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
