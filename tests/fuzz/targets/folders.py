"""Saved results: atlases, circuits, evaluations, massive activations, calibrations, truths."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import tiny
from hypothesis import strategies as st
from typer.testing import CliRunner

import interp
from interp.calibration.calibration import Calibration
from interp.circuits.circuit import Circuit
from interp.circuits.judging.agreement import Agreement
from interp.circuits.known.truth import Truth
from interp.cli.main import app
from interp.results.evaluation import Evaluation
from interp_hooks import Head, hook

from ..nasty import broken, json_texts
from ..target import Target


class Folders(Target):
    """`load` of folders in which one file is broken, or says something else with a right hash."""

    name = "folders"

    def prepare(self) -> None:
        from train_pocket_llama import build_tokenizer

        tokenizer = build_tokenizer()
        model = hook(tiny.build("llama", len(tokenizer)), name="tiny", tokenizer=tokenizer)
        scan = dict(context=32, samples=2, progress=False)
        atlas = interp.scan_heads(model, ["sink", "value_drain"], **scan)
        atlas.samples = {"sink": {(0, 0): (0.5, 0.25)}}
        atlas.massive = interp.massive_activations(model, context=32, samples=1)
        atlas.save(self.folder / "atlas")
        circuit = interp.circuits.find(model, "ioi", "head_ablation", n=4, force=True)
        circuit.save(self.folder / "circuit")
        evaluation = interp.evaluate(model, "ioi", n=4, force=True)
        evaluation.save(self.folder / "evaluation")
        judged = interp.circuits.evaluate(circuit["head_ablation"], ["L0H0", "L1H0"])
        judged.save(self.folder / "agreement")
        truth = Truth("mine", {Head(0, 1): "head"}, 2, 4, "here", "tiny")
        (self.folder / "truth").mkdir()
        truth.save(self.folder / "truth" / "truth.json")
        found = interp.calibrate(model, "zerotuning", "ioi", n=8, force=True)
        (self.folder / "calibration").mkdir()
        found.save(self.folder / "calibration" / "edit.json")
        self.loaders = {
            "atlas": interp.Atlas.load,
            "circuit": Circuit.load,
            "evaluation": Evaluation.load,
            "agreement": Agreement.load,
            "truth": lambda folder: Truth.load(folder / "truth.json"),
            "calibration": lambda folder: Calibration.load(folder / "edit.json"),
        }
        self.files = {
            name: {f.name: f.read_bytes() for f in sorted((self.folder / name).iterdir())}
            for name in self.loaders
        }
        shutil.rmtree(self.folder / "circuit")

    def inputs(self) -> st.SearchStrategy[Any]:
        return st.sampled_from(sorted(self.files)).flatmap(
            lambda name: st.sampled_from(sorted(self.files[name])).flatmap(
                lambda file: st.tuples(st.just(name), st.just(file), self._content(name, file))
            )
        )

    def _content(self, name: str, file: str) -> st.SearchStrategy[Any]:
        content = self.files[name][file]
        choices: list[st.SearchStrategy[Any]] = [broken(content), st.just(None)]
        if file.endswith(".json"):
            choices += [json_texts([json.loads(content)])] * 3
        if file.endswith(".parquet"):
            choices += [_frames(pd.read_parquet(io.BytesIO(content)))] * 3
        return st.one_of(choices)

    def run(self, value: Any) -> str:
        name, file, content = value
        folder = self.folder / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for other, whole in self.files[name].items():
            (folder / other).write_bytes(whole)
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)
            self._rehash(folder, file)
        loaded = self.loaders[name](folder)
        repr(loaded)
        if name in ("atlas", "circuit", "evaluation"):
            shown = CliRunner().invoke(app, ["show", str(folder)])
            if shown.exception is not None and not isinstance(shown.exception, SystemExit):
                raise shown.exception
            assert shown.exit_code in (0, 2), shown.output
        if isinstance(loaded, interp.Atlas):
            for score in loaded.scores:
                loaded.ranking(score, 3)
                loaded.measured(score)
            loaded._repr_html_()
        return f"right: {name}"

    def _rehash(self, folder: Path, file: str) -> None:
        """The hash of the numbers in the head, so that what is in them is looked at too."""
        for head in folder.glob("*.json"):
            try:
                said = json.loads(head.read_bytes())
            except (ValueError, RecursionError):
                continue
            key = "frame_sha256"
            numbers = folder / f"{head.stem}.parquet"
            if isinstance(said, dict) and key in said and file == numbers.name:
                said[key] = hashlib.sha256(numbers.read_bytes()).hexdigest()
                head.write_text(json.dumps(said))


@st.composite
def _frames(draw: st.DrawFn, frame: pd.DataFrame) -> bytes:
    """A table as parquet with a column gone, doubled, of another type, or rows gone or twice."""
    frame = frame.copy()
    columns = list(frame.columns)
    column = draw(st.sampled_from(columns))
    kind = draw(st.sampled_from(["gone", "other", "added", "rows", "twice", "value", "none"]))
    if kind == "gone":
        frame = frame.drop(columns=column)
    elif kind == "other":
        frame[column] = draw(st.sampled_from(["text", "1", None, 1.5, -1, True, 10**12]))
    elif kind == "added":
        frame[draw(st.sampled_from(["", "extra", "kv_head_stderr", "layer_low"]))] = "text"
    elif kind == "rows":
        frame = frame.iloc[: draw(st.integers(0, len(frame)))]
    elif kind == "twice":
        frame = pd.concat([frame, frame])
    elif kind == "value" and len(frame):
        values = frame[column].astype(object)
        values.iloc[0] = draw(st.sampled_from([-1, 10**9, 1.5, float("nan"), float("inf")]))
        frame[column] = values
    buffer = io.BytesIO()
    try:
        frame.to_parquet(buffer, index=False)
    except Exception:  # pyarrow can't hold it, so no such file is there
        return b"PAR1"
    return buffer.getvalue()
