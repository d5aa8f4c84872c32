"""Texts read in chunks over a cache give the statistics of the whole text, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import interp
from interp.errors import InputError, ModelError
from interp.inputs.chunks import check_chunks, watched
from interp_hooks import Question, hook
from interp_hooks.errors import TapError
from interp_hooks.huggingface.context import grows_with_length
from interp_kernels import Received

LENGTH = 83


def everything() -> Question:
    torch.manual_seed(3)
    slots = torch.arange(LENGTH)
    return Question(
        frozenset({"entropy", "max", "argmax", "distance", "capped_distance", "group_mass",
                   "key_mass", "value_norm", "topk"}),
        pairs={"first": torch.zeros(1, 1, 1, dtype=torch.long), "before": slots[None, :, None] - 1,
               "two": torch.randint(0, LENGTH, (1, LENGTH, 2))},
        received={"all": Received(), "some": Received(torch.rand(1, LENGTH) < 0.4, reduce="sum"),
                  "near": Received(band=(0, 9)), "most": Received(reduce="max")},
        labels=slots[None] % 3 - 1,
        n_groups=2,
        topk=3,
        z=True,
    )  # fmt: skip


SIZES = [(name, chunk) for name in ("llama", "mistral") for chunk in (16, 40, 82, 83, 200)]
OTHERS = [(name, 40) for name in ("gpt2", "gpt_oss", "gemma2", "gemma3", "qwen3")]


@pytest.mark.parametrize("name, chunk", SIZES + OTHERS)
def test_every_statistic_is_that_of_the_whole(name: str, chunk: int, tapped: Any) -> None:
    """Sliding windows, learned sinks, soft-caps and learned positions too."""
    model, _ = tapped(name)
    ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    found: list[list[Any]] = [[], []]
    with torch.no_grad():
        for layers, size in zip(found, (None, chunk), strict=True):
            watched(model, everything(), layers.append, ids, None, size)
    assert len(found[0]) == len(found[1]) == len(model.sites)
    for whole, parts in zip(*found, strict=True):
        assert whole.site == parts.site and (parts.q_start, parts.k_start) == (0, 0)
        for what in ("rows", "pair_mass", "received", "received_count"):
            one, other = getattr(whole, what), getattr(parts, what)
            assert one.keys() == other.keys() and one
            for key, value in one.items():
                torch.testing.assert_close(
                    other[key], value, atol=2e-4, rtol=2e-3, msg=lambda m, k=key: f"{k}: {m}"
                )
        torch.testing.assert_close(parts.z, whole.z, atol=1e-4, rtol=1e-3)
        assert torch.equal(parts.queries, whole.queries) and torch.equal(parts.keys, whole.keys)


def test_padded_rows(tapped: Any) -> None:
    model, _ = tapped("llama")
    torch.manual_seed(5)
    ids, mask = torch.randint(3, 100, (2, 50)), torch.ones(2, 50, dtype=torch.long)
    mask[1, :21] = 0
    asked = Question(frozenset({"entropy"}), received={"all": Received()})
    found: list[list[Any]] = [[], []]
    with torch.no_grad():
        for layers, size in zip(found, (None, 16), strict=True):
            watched(model, asked, layers.append, ids, mask, size)
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(parts.queries, whole.queries) and torch.equal(parts.keys, whole.keys)
        torch.testing.assert_close(parts.entropy, whole.entropy, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts.received["all"], whole.received["all"])


@pytest.mark.slow
def test_all_scores_of_a_scan(tokenizer: Any) -> None:
    """Every score of texts and needles; what runs the model itself is as it was."""
    model = hook(tiny.build("llama", len(tokenizer)), tokenizer=tokenizer, name="tiny")
    names = [
        s.name
        for s in interp.scores.select("all,-importance")
        if not s.needs_images and getattr(s, "probe", None)
    ]
    frames, plans = [], []
    for chunk in (None, 24):
        plan = interp.plan_scan(model, names, context=96, samples=2, force=True, chunk=chunk)
        plans.append(plan)
        frames.append(plan.run().frame)
    assert {b.chunk for bs in plans[1]._batches.values() for b in bs} == {24}
    assert plans[1].record()["fingerprint"] != plans[0].record()["fingerprint"]
    columns = [name for name in names if name in frames[0]]
    assert len(columns) >= 12
    for name in columns:
        one, other = (torch.tensor(f[name].to_numpy(dtype=float)) for f in frames)
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-3, equal_nan=True)


def test_a_chunk_is_never_the_whole_in_memory(tapped: Any) -> None:
    """No layer sees more query rows than a chunk has."""
    model, _ = tapped("llama")
    rows: list[int] = []
    question, ids = Question(frozenset({"max"})), torch.arange(90)[None]
    norm = model.module.model.layers[0].input_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    try:
        watched(model, question, lambda stats: None, ids, None, 32)
    finally:
        handle.remove()
    assert rows == [32, 32, 26]


def test_what_is_of_one_forward_is_refused(tapped: Any) -> None:
    model, _ = tapped("llama")
    with pytest.raises(TapError, match="without chunks"):
        watched(model, Question(call=True), lambda s: None, torch.arange(90)[None], None, 32)


def test_models_whose_chunks_are_another_text_are_refused(tapped: Any) -> None:
    model, _ = tapped("llama")
    ids = torch.arange(60)[None]
    check_chunks(model, 16, ids, 100)
    with pytest.raises(InputError, match="too short"):
        check_chunks(model, 4, ids, 100)
    config = tiny.build("llama", max_position_embeddings=64).config
    for kind in ("dynamic", "longrope"):
        config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
        assert grows_with_length(config, 100) == kind
        assert grows_with_length(config, 64) == ""
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert grows_with_length(config, 1000) == ""


def test_attention_that_is_another_over_a_cache_is_found(
    tapped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk as if it were a text of its own."""
    model, _ = tapped("llama")
    own = type(model.module).forward

    def forgets(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = None
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model.module), "forward", forgets)
    with pytest.raises((ModelError, TapError)):
        check_chunks(model, 16, torch.arange(60)[None], 100)


def test_dynamic_positions_are_refused_in_a_plan(tokenizer: Any) -> None:
    module = tiny.build("llama", len(tokenizer), max_position_embeddings=64)
    model = hook(module, tokenizer=tokenizer, name="tiny")
    module.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ModelError, match="dynamic"):
        interp.plan_scan(model, ["sink"], context=128, samples=1, chunk=32, extrapolate=True)
