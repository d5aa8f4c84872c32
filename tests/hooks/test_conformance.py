"""The conformance checks: thirty architectures agree with eager attention, and each planted fault
is found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from interp_hooks import engine, hook
from interp_hooks.conformance import sweep, table
from interp_hooks.conformance.building import KINDS, build, classes
from interp_hooks.conformance.checks import Comparison, Outcome, check
from interp_hooks.conformance.configs import tiny

FAST = [
    *(("causal", name) for name in (
        "llama gpt2 gpt_neox opt qwen2 qwen3 mistral mixtral gemma2 gemma3_text gpt_oss phi3 "
        "olmo2 cohere2 granite starcoder2 stablelm smollm3 qwen3_next lfm2 minimax gpt_bigcode"
    ).split()),
    *(("masked", name) for name in "bert roberta distilbert modernbert".split()),
    *(("seq2seq", name) for name in "bart t5 marian pegasus".split()),
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    import transformers

    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.mark.parametrize("kind, model_type", FAST)
def test_equals_eager(kind: str, model_type: str) -> None:
    row = sweep.examine(kind, model_type)
    assert row.status == "equal", row.wrong or row.reason
    assert row.compared >= 20


def test_thirty() -> None:
    assert len(set(FAST)) == 30


def test_models_without_attention_say_so() -> None:
    row = sweep.examine("causal", "mamba")
    assert row.status == "no attention" and "state space" in row.reason


def _compared() -> list[Outcome]:
    built = build("causal", "llama")
    model = hook(built.module)
    return Comparison(model, built.inputs, built.padded).run()


@contextmanager
def _calls(monkeypatch: pytest.MonkeyPatch, change: Any) -> Iterator[None]:
    """Attention calls changed on their way into the kernels."""
    one = engine._one

    def changed(call: Any, *rest: Any) -> Any:
        return one(change(call), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_one", changed)
        yield


@pytest.mark.parametrize(
    "fault, found_in",
    [
        (lambda call: replace(call, scaling=call.scaling * 1.02), "entropy"),
        (lambda call: replace(call, value=call.value.flip(1)), "z"),
        (lambda call: replace(call, mask=replace(call.mask, causal=False)), "distance"),
        (lambda call: replace(call, mask=replace(call.mask, keys=None)), "received"),
        (lambda call: replace(call, mask=replace(call.mask, window=3)), "topk"),
    ],
    ids=["scaling", "kv heads", "causality", "padding", "window"],
)  # fmt: skip
def test_planted_faults_are_found(
    fault: Any, found_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build("causal", "llama")
    model = hook(built.module)
    comparison = Comparison(model, built.inputs, built.padded)
    with _calls(monkeypatch, fault):
        outcomes = comparison.run()
    wrong = [o.check for o in outcomes if o.status == "wrong"]
    assert any(found_in in name for name in wrong), wrong


def test_an_edit_that_does_not_arrive_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from interp_hooks.conformance import checks

    monkeypatch.setattr(checks.Initial, "touches", lambda self, call: False)
    assert {o.check for o in _compared() if o.status == "wrong"} == {"ZeroTuning"}


def test_wrong_head_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("causal", "llama")
    model = hook(built.module)
    own = model.head_weights

    def rolled(layer: int, tower: str = "") -> Any:
        weights = own(layer, tower)
        return replace(weights, W_V=weights.W_V.roll(1, 0))

    monkeypatch.setattr(model, "head_weights", rolled)
    outcomes = Comparison(model, built.inputs).run()
    assert {o.check.split()[0] for o in outcomes if o.status == "wrong"} == {"W_V"}


def test_a_model_of_ones_own() -> None:
    model = hook(build("causal", "qwen2").module)
    outcomes = check(model)
    assert {o.mode for o in outcomes} >= {"plain", "padded", "decode", "generate"}
    assert {o.status for o in outcomes} == {"equal"}


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "vlm"])
def test_every_class_named_is_there(kind: str) -> None:
    import transformers

    assert all(hasattr(transformers, name) for name in classes(kind).values())


def test_tiny_configs_are_tiny() -> None:
    import transformers

    config = tiny(transformers.LlamaConfig)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, 128)
    own = tiny(transformers.LlamaConfig, dict(num_key_value_heads=1, hidden_size=64))
    assert (own.num_key_value_heads, own.hidden_size) == (1, 64)


def test_peaky_patterns() -> None:
    built = build("causal", "llama")
    with torch.no_grad():
        pattern = built.module(**built.inputs, output_attentions=True).attentions[1]
    seen = torch.arange(1, 13).double()
    entropy = -(pattern * pattern.clamp_min(1e-12).log()).sum(-1)
    assert float((entropy / seen.log().clamp_min(1e-9))[..., 4:].mean()) < 0.97  # of uniform's


def test_the_page() -> None:
    rows = [
        sweep.Row("causal", "llama", "equal", compared=47, refused=["plain weights 0: no | map"]),
        sweep.Row("causal", "mamba", "no attention", "a state space model"),
        sweep.Row("causal", "odd", "wrong", "plain z 1: 3e-1"),
    ]
    page = table.page(rows, dict(transformers="5.23.0", date="2026-11-28"))
    assert "1 of 2 (50%)" in page and "| odd | wrong |  | plain z 1: 3e-1 |" in page
    assert "no \\| map" in page
