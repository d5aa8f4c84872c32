"""GGUF files with broken headers, names, sizes and tensors."""

from __future__ import annotations

from typing import Any

import tiny_gguf
from hypothesis import strategies as st

import interp

from ..nasty import broken
from ..target import Target


class GgufFiles(Target):
    """`interp.load("FILE.gguf")`."""

    name = "gguf"
    limit = 60.0

    def prepare(self) -> None:
        path = tiny_gguf.write(self.folder / "whole.gguf", "llama", tiny_gguf.model("llama"))
        self.content = path.read_bytes()
        #: where the tensors begin, about: what lies before is the header
        self.header = self.content[: len(self.content) - 4 * 60_000]

    def inputs(self) -> st.SearchStrategy[Any]:
        near = self.content[:4096]
        return st.one_of(
            broken(near).map(lambda start: start + self.content[4096:]),
            broken(self.content[:96]).map(lambda start: start + self.content[96:]),
            broken(self.content),
            st.binary(max_size=64),
            st.integers(0, len(self.content)).map(lambda n: self.content[:n]),
        )

    def run(self, value: Any) -> str:
        path = self.folder / "m.gguf"
        path.write_bytes(value)
        model = interp.load(path, device="cpu")
        model.logits(model.tokenizer("the cat", return_tensors="pt").input_ids)
        return "right"
