"""Edits in JSON: what `interp.edits.load` and `--edit` take."""

from __future__ import annotations

import json
from typing import Any

import tiny
import torch
from hypothesis import strategies as st

import interp
from interp_hooks import hook

from ..nasty import json_texts, jsons, mutated
from ..target import Target

E = interp.edits


class EditJson(Target):
    """`load`, `from_json` and, of what is read, a block on a tiny model and JSON again."""

    name = "edits"

    def prepare(self) -> None:
        edits = [
            E.Ablate(["L0H1"]),
            E.ScaleHeads({(0, 1): 0.5}),
            E.ScaleTokens((1, 3), 2.0),
            E.MoveMass([1], (2, 4)),
            E.OverwriteRow(None, [2, 5], [[0.5, 1], [2, -0.5]], query=[6, 7]),
            E.ACT(heads=["L0H0"]),
            E.ZeroTuning(2.0),
            E.SoftPAG(0.5),
            E.Streaming(1, 4),
            E.Gate({"L0H0": 0.5}, 1, 4),
            E.Gate(torch.rand(2, 2, generator=torch.Generator().manual_seed(0)), 1, 4),
            E.HeadGate(),
            E.SigmoidAttention(-2.0),
            E.VHR("0.1", 3.0),
            E.PAINT("image", 0.35),
            E.VAR((2, 5), {0: [0, 1]}),
        ]
        E.save(self.folder / "whole.json", edits)
        self.documents = json.loads((self.folder / "whole.json").read_text())
        names = {entry["edit"] for entry in self.documents}
        self.documents += [{"edit": name} for name in E.registry.names() if name not in names]
        self.model = hook(tiny.build("llama"), name="tiny")
        self.ids = torch.arange(8)[None]

    def inputs(self) -> st.SearchStrategy[Any]:
        one = st.sampled_from(self.documents).flatmap(mutated)
        return st.one_of(
            one, one, one, st.lists(one, max_size=3), jsons, json_texts(self.documents)
        )

    def run(self, value: Any) -> str:
        if isinstance(value, bytes):
            path = self.folder / "edits.json"
            path.write_bytes(value)
            edits = E.load(path)
        else:
            edits = E.from_json(value, self.folder)
        with self.model.edit(*edits):
            logits = self.model.logits(self.ids)
        assert logits.shape == (1, 8, 101)
        if not torch.isfinite(logits).all():
            return "right: not finite"
        E.from_json(E.to_json(edits, self.folder), self.folder)
        return "right"
