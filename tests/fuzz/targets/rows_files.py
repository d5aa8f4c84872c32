"""Files of rows: prompts of circuits, and tasks of one's own."""

from __future__ import annotations

import json
from typing import Any

import tiny
from hypothesis import strategies as st

import interp
from interp.circuits.runs.prompts import from_texts, read
from interp_hooks import hook

from ..nasty import broken, json_texts, texts
from ..target import Target

PAIR = {"clean": "The cat saw a dog", "corrupted": "The cat saw a wolf", "answer": " the"}


class PromptFiles(Target):
    """`interp circuit --prompts FILE`."""

    name = "prompts"

    def prepare(self) -> None:
        from train_pocket_llama import build_tokenizer

        tokenizer = build_tokenizer()
        self.model = hook(tiny.build("llama", len(tokenizer)), name="tiny", tokenizer=tokenizer)

    def inputs(self) -> st.SearchStrategy[Any]:
        rows = st.fixed_dictionaries(
            {"clean": texts, "corrupted": texts, "answer": texts}, optional={"wrong": texts}
        )
        made = st.lists(rows, max_size=3).map(_lines)
        return st.one_of(
            json_texts([[PAIR, PAIR], PAIR, [{**PAIR, "wrong": [" a"]}]]),
            broken(_lines([PAIR, PAIR])),
            made,
            st.lists(st.sampled_from([PAIR, {**PAIR, "wrong": " a"}]), min_size=1).map(_lines),
        )

    def run(self, value: Any) -> str:
        path = self.folder / "prompts.jsonl"
        path.write_bytes(value)
        prompts = from_texts(self.model, read(path))
        assert len(prompts) if hasattr(prompts, "__len__") else True
        return "right"


class TaskFiles(Target):
    """`interp evaluate --task FILE.jsonl`."""

    name = "tasks"

    def prepare(self) -> None:
        from train_pocket_llama import build_tokenizer

        self.tokenizer = build_tokenizer()

    def inputs(self) -> st.SearchStrategy[Any]:
        labelled = [{"text": f"film {n}", "label": "good" if n % 2 else "bad"} for n in range(4)]
        pairs = [{"input": str(n), "output": str(n + 1)} for n in range(13)]
        odd = st.fixed_dictionaries({"text": texts, "label": texts})
        return st.tuples(
            st.one_of(
                json_texts([labelled, pairs]),
                broken(_lines(labelled)),
                broken(_lines(pairs)),
                st.lists(odd, min_size=2, max_size=4).map(_lines),
                st.lists(st.sampled_from(labelled), min_size=2, max_size=6).map(_lines),
                st.permutations(pairs).map(_lines),
            ),
            st.sampled_from([None, "bare", "lead", "chat", "few-shot", "nonsense"]),
        )

    def run(self, value: Any) -> str:
        content, format = value
        path = self.folder / "task.jsonl"
        path.write_bytes(content)
        task = interp.tasks.get(str(path))
        if format is not None:
            task = type(task)(str(path), format=format)
        assert len(task.sample(self.tokenizer, 2)) == 2
        return "right"


def _lines(rows: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()
