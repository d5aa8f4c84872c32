"""The features on a model that nobody here trained: what must hold on SmolLM2-135M-Instruct."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import interp
from interp import tasks
from interp.errors import FloorError
from interp.evaluation.ablation import controls
from interp.tasks.answers import judge
from interp.tasks.niah import NeedleInAHaystack
from interp_hooks import Head


@pytest.fixture(scope="module")
def atlas(smollm2: Any) -> interp.Atlas:
    return interp.scan_heads(
        smollm2, "retrieval,qr,retrieval_forced", context=256, samples=12, progress=False
    )


def test_the_needles_format_is_found(smollm2: Any) -> None:
    found = tasks.pose(smollm2, tasks.get("niah"))
    assert found.task.format == "lead"
    assert found.solved["bare"] <= 1 and found.solved["lead"] >= 6


def test_needles_at_a_thousand_tokens_are_found(smollm2: Any) -> None:
    result = interp.evaluate(smollm2, "niah", n=12, context=1024, format="lead")
    assert result.baseline.mean >= 0.75


def test_heads_that_copy_are_told(atlas: interp.Atlas) -> None:
    assert Head(18, 6) in atlas.top("retrieval", 3)
    assert Head(18, 6) in atlas.top("retrieval_forced", 3)
    assert any("format lead" in note for note in atlas.notes)


def test_without_them_no_needle_is_found(smollm2: Any, atlas: interp.Atlas) -> None:
    task = NeedleInAHaystack(lengths=(256,), format="lead")
    problems = task.sample(smollm2.tokenizer, 10, 3)

    def found(heads: list[Head]) -> float:
        return float(
            np.mean([c for c, _ in judge(smollm2, task, problems, [interp.edits.Ablate(heads)])])
        )

    top = atlas.top("retrieval", 8)
    own = [h for h in smollm2.heads if atlas.frame["retrieval"][smollm2.heads.index(h)] >= 0.1]
    draws = [controls(smollm2, top, own, np.random.default_rng([1, k])) for k in range(4)]
    assert found(top) <= 0.1
    assert np.mean([found(draw) for draw in draws]) >= 0.6


def test_a_format_it_does_not_understand_is_refused(smollm2: Any) -> None:
    with pytest.raises(FloorError, match=r"niah in the format bare: accuracy 0.00 of 8"):
        interp.evaluate(smollm2, "niah", n=8, context=256, format="bare")


@pytest.mark.parametrize("name", ["ioi", "greater_than", "docstring", "colored_objects"])
def test_default_tasks_give_a_result(smollm2: Any, name: str) -> None:
    assert interp.evaluate(smollm2, name, n=16).baseline.mean > 0.4
