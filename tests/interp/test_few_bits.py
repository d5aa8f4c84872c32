"""Models in bf16, fp16 and int8: what the tap says of them is what their own attention is, and
scores are those of the same model in float32 up to the digits that there are."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import interp
from interp.errors import MissingExtraError
from interp_hooks import Question, hook

NAMES = frozenset({"entropy", "max", "argmax", "distance"})
SCORES = ["sink", "entropy", "max_prob", "distance", "previous_token", "later_sink", "fai"]


def quantised(model: Any) -> Any:
    """Linear layers with weights of 8 bits, in place of none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8
        )


def of_kind(kind: str, vocabulary: int = 101) -> Any:
    model = tiny.build("llama", vocabulary, hidden_size=64)
    if kind == "int8":
        return quantised(model)
    return model.to(getattr(torch, kind))


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8"])
def test_statistics_are_those_of_the_model_s_own_queries_and_keys(kind: str) -> None:
    """In float64, of what reaches attention: nothing is lost to the few bits after that. And the
    model goes on as without a tap."""
    handle = hook(of_kind(kind))
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []
    with torch.no_grad():
        with handle.watch(Question(NAMES, call=True), seen.append):
            tapped = handle.module(ids).logits
        plain = handle.module(ids).logits
    coarse = {"bfloat16": 0.3, "float16": 0.03, "int8": 1e-3}[kind]
    torch.testing.assert_close(tapped, plain, atol=coarse, rtol=coarse)
    slots = torch.arange(40)
    away = (slots[:, None] - slots).clamp_min(0).double()
    for stats in seen:
        call = stats.call
        group = call.site.n_heads // call.site.n_kv_heads
        keys = call.key.double().repeat_interleave(group, 1)
        logits = call.query.double() @ keys.transpose(-1, -2) * call.scaling
        a = logits.masked_fill(slots[:, None] < slots, -torch.inf).softmax(-1)
        close = dict(atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(stats.entropy.double(), torch.special.entr(a).sum(-1), **close)
        torch.testing.assert_close(stats.max.double(), a.amax(-1), **close)
        torch.testing.assert_close(
            stats.distance.double(), (a * away).sum(-1), atol=4e-4, rtol=2e-5
        )
        assert torch.equal(stats.argmax, a.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("kind, most", [("bfloat16", 3e-2), ("float16", 1e-2), ("int8", 5e-2)])
def test_a_scan(kind: str, most: float, tokenizer: Any) -> None:
    frames = []
    for one in ("float32", kind):
        model = hook(of_kind(one, len(tokenizer)), tokenizer=tokenizer, name="tiny")
        frames.append(interp.scan_heads(model, SCORES, context=64, samples=2, progress=False).frame)
    for name in SCORES:
        wide, few = (torch.tensor(frame[name].to_numpy(dtype=float)) for frame in frames)
        assert few.isfinite().all()
        assert float((few - wide).abs().max()) <= most * max(1.0, float(wide.abs().max()))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_chunks(kind: str) -> None:
    """The same up to the type's rounding, and not refused for it."""
    from interp.inputs.chunks import check_chunks, watched

    model = hook(of_kind(kind))
    ids = torch.randint(3, 100, (1, 60), generator=torch.Generator().manual_seed(1))
    check_chunks(model, 16, ids, 60)
    found: list[list[Any]] = [[], []]
    with torch.no_grad():
        for layers, size in zip(found, (None, 16), strict=True):
            watched(model, Question(NAMES), layers.append, ids, None, size)
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts.max, whole.max, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(parts.entropy, whole.entropy, atol=3e-2, rtol=2e-2)


def saved(folder: Path, tokenizer: Any) -> Path:
    tiny.build("llama", len(tokenizer), hidden_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_int8_on_loading_needs_its_package(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else there(name, *a)
    )
    with pytest.raises(MissingExtraError, match="torchao"):
        interp.load(saved(tmp_path, tokenizer), quantization="int8")


@pytest.mark.slow
def test_int8_on_loading(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("torchao")
    folder = saved(tmp_path, tokenizer)
    ids = torch.arange(3, 40)[None]
    entropies = []
    for quantization in (None, "int8"):
        model = interp.load(folder, quantization=quantization)
        seen: list[Any] = []
        with torch.no_grad(), model.watch(Question(NAMES), seen.append):
            model(input_ids=ids)
        entropies.append(torch.stack([stats.entropy for stats in seen]))
    assert float((entropies[0] - entropies[1]).abs().mean()) < 0.05
    assert not torch.equal(*entropies)
