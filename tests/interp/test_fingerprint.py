"""Digests of weights, code and values: every change is seen, equal things are equal anywhere."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import interp
from interp.errors import ModelError
from interp.support.fingerprint import fingerprint, package_code
from interp.support.provenance import differences, identity, provenance
from interp.support.tensor_digest import BLOCK, file_digest, tensor_digest
from interp.support.weights import state_hash, weights_hash
from interp_hooks import HookedModel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool]


def test_a_copy_counts_as_the_original() -> None:
    """In another process nothing is shared with a class's defaults, or between two fields."""
    shared = (0.25, 0.5)
    one = {"a": shared, "b": [shared, {"c": shared}]}
    own = [tuple(x for x in shared) for _ in range(3)]
    apart = {"a": own[0], "b": [own[1], {"c": own[2]}]}
    assert apart["a"] is not apart["b"][0]
    assert fingerprint(one) == fingerprint(apart)
    task = interp.tasks.get("niah")
    assert fingerprint(task) == fingerprint(copy.deepcopy(task))
    loop: list[Any] = [1]
    loop.append(loop)
    other: list[Any] = [1]
    other.append(other)
    assert fingerprint(loop) == fingerprint(other) != fingerprint([1, [1]])


def sums(words: list[int]) -> list[int]:
    """The pair of sums of one block, in whole numbers of any size."""
    mask = (1 << 64) - 1
    factors = []
    for i in range(1, len(words) + 1):
        x = i * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        factors.append((x ^ x >> 31) | 1)
    return [
        sum(w * f for w, f in zip(words, factors, strict=True)) & mask,
        sum((w >> 32) * f for w, f in zip(words, factors, strict=True)) & mask,
    ]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=8), st.binary(max_size=7))
def test_the_sums_are_those_of_the_definition(words: list[int], rest: bytes) -> None:
    from interp.support.tensor_digest import _sums

    raw = np.array(words, np.uint64).tobytes() + rest
    expected = np.array(sums(words), np.uint64).tobytes() + rest
    assert _sums(np.frombuffer(raw, np.uint8)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 8 * BLOCK + 3])
def test_one_number_of_any_type_is_seen(dtype: torch.dtype, size: int) -> None:
    whole = torch.zeros(size, dtype=dtype)
    for place in {0, size // 2, size - 1}:
        other = whole.clone()
        other[place] = 1
        assert tensor_digest(other) != tensor_digest(whole)
    assert tensor_digest(whole.clone()) == tensor_digest(whole)
    assert tensor_digest(whole[None]) != tensor_digest(whole)  # another shape


def test_turned_signs_do_not_cancel() -> None:
    """The sign of a word's upper number is one bit of 64: alone it would be lost in pairs."""
    plain = torch.ones(2 * BLOCK)
    for places in ([1, 3], [1, 2 * BLOCK - 1], list(range(2 * BLOCK)), list(range(1, 64, 2))):
        other = plain.clone()
        other[places] *= -1
        assert tensor_digest(other) != tensor_digest(plain)


@pytest.mark.parametrize("part", [slice(None), slice(1, None), slice(None, None, 3)], ids=str)
def test_a_view_is_what_it_shows(part: slice) -> None:
    numbers = torch.arange(3000, dtype=torch.int8)
    assert tensor_digest(numbers[part]) == tensor_digest(numbers[part].clone())
    square = torch.arange(12.0).reshape(3, 4)
    assert tensor_digest(square.T) == tensor_digest(square.T.contiguous())
    assert tensor_digest(square.conj()) == tensor_digest(square)


def test_quantised_and_sparse_tensors() -> None:
    x = torch.arange(8.0)
    one, two = (torch.quantize_per_tensor(x, s, 0, torch.qint8) for s in (1.0, 2.0))
    assert tensor_digest(one) != tensor_digest(two)
    assert tensor_digest(x.to_sparse()) == tensor_digest(x)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "x"
    seen = set()
    for content in (b"", b"a", b"a" * 9, b"a" * 8 + b"b"):
        file.write_bytes(content)
        seen.add(file_digest(file))
    assert len(seen) == 4


# --- models


def heads_of(module: Any) -> list[tuple[torch.Tensor, slice]]:
    """The rows of W_Q of every head of every layer."""
    size = module.config.hidden_size // module.config.num_attention_heads
    return [
        (layer.self_attn.q_proj.weight, slice(h * size, (h + 1) * size))
        for layer in module.model.layers
        for h in range(module.config.num_attention_heads)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_head_of_any_layer_is_another_model(dtype: torch.dtype) -> None:
    module = tiny.build("llama").to(dtype)
    seen = {weights_hash(module)}
    with torch.no_grad():
        for weight, rows in heads_of(module):
            weight[rows] *= -1
            seen.add(weights_hash(module))
            weight[rows] *= -1
    assert len(seen) == 1 + len(heads_of(module))
    assert weights_hash(copy.deepcopy(module)) in seen


def test_buffers_count_and_those_that_are_not_saved() -> None:
    module = tiny.build("llama")
    before = weights_hash(module)
    module.model.rotary_emb.inv_freq *= 1.5
    assert "model.rotary_emb.inv_freq" not in module.state_dict() and weights_hash(module) != before


def test_weights_without_values_are_refused_and_offloaded_ones_read() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2))
    wanted = weights_hash(module)
    kept = {f"0.{name}": tensor.detach() for name, tensor in module[0].named_parameters()}
    module.to("meta")
    with pytest.raises(ModelError, match="without values"):
        weights_hash(module)
    module._hf_hook = SimpleNamespace(weights_map=kept)
    assert weights_hash(module) == wanted


def test_what_a_model_computes_beside_its_weights() -> None:
    module = tiny.build("llama")
    attention = module.model.layers[1].self_attn
    plain = state_hash(module)
    assert state_hash(copy.deepcopy(module)) == plain

    def steer(factor: float) -> Callable[..., Any]:
        return lambda module, args, out: (out[0] * factor, *out[1:])

    def changed(change: Callable[[], Callable[[], Any]]) -> str:
        undo = change()
        found = state_hash(module)
        undo()
        assert state_hash(module) == plain
        return found

    def scale() -> Callable[[], Any]:
        attention.scaling *= 2
        return lambda: setattr(attention, "scaling", attention.scaling / 2)

    def config() -> Callable[[], Any]:
        module.config.rms_norm_eps *= 10
        return lambda: setattr(module.config, "rms_norm_eps", module.config.rms_norm_eps / 10)

    changes: list[Callable[[], Callable[[], Any]]] = [
        scale,
        config,
        lambda: module.train() and module.eval,
        lambda: attention.register_forward_hook(steer(2.0)).remove,
        lambda: attention.register_forward_hook(steer(3.0)).remove,
    ]
    assert len({plain, *map(changed, changes)}) == 1 + len(changes)


def test_adapters_merged_on_and_off_are_other_models() -> None:
    peft = pytest.importorskip("peft")
    module = tiny.build("llama")
    plain = weights_hash(module)
    adapted = peft.get_peft_model(
        module, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    on = weights_hash(adapted), state_hash(adapted)
    with adapted.disable_adapter():
        assert (weights_hash(adapted), state_hash(adapted)) != on
    assert (weights_hash(adapted), state_hash(adapted)) == on
    assert weights_hash(adapted.merge_and_unload()) != plain


# --- code and values


def test_code_counts_and_how_it_is_written_does_not() -> None:
    def make(text: str, name: str = "things_of_a_user") -> Any:
        module = ModuleType(name)
        exec(text, vars(module))
        return module.Score()

    text = (
        "K = 2\ndef helper(x):\n    return x * K\n"
        "class Base:\n    def ask(self):\n        return 1\n"
        "class Score(Base):\n    rate = 0.5\n"
        "    def measure(self, x):\n        return helper(x)\n"
    )
    plain = fingerprint(make(text))
    same = text.replace("return helper(x)", "# why\n        return helper(x)")
    assert fingerprint(make("\n\n" + same)) == plain
    others = [
        text.replace(*change)
        for change in (("K = 2", "K = 3"), ("x * K", "x + K"), ("return 1", "return 2"),
                       ("rate = 0.5", "rate = 0.25"), ("helper(x)\n", "helper(x) + 1\n"))
    ]  # fmt: skip
    found = [fingerprint(make(other)) for other in others]
    assert len({plain, *found}) == 1 + len(others)
    one = make(text)
    one.k = 3
    assert fingerprint(one) != plain


def test_values() -> None:
    values = [
        *(0, 1, True, None, "1", b"1", 1.0, float("nan"), (1, 2), [1, [2]], {"a": 1}, {1, 2}),
        *(np.arange(3), np.arange(3.0), torch.arange(3), Path("a"), slice, len),
    ]
    assert len({fingerprint(v) for v in values}) == len(values)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    loop: list[Any] = [1]
    loop.append(loop)
    assert fingerprint(loop) == fingerprint(loop)

    def add(n: int) -> Callable[[int], int]:
        return lambda x: x + n

    assert fingerprint(add(1)) != fingerprint(add(2)) and fingerprint(add(1)) == fingerprint(add(1))


def test_it_is_the_same_in_another_process() -> None:
    script = (
        "import interp, tiny\nfrom interp import scores, probes\n"
        "from interp.support.fingerprint import fingerprint\n"
        "from interp.support.weights import weights_hash\n"
        "m = tiny.build('llama')\n"
        "print(weights_hash(m), fingerprint({'b', 'a', 'c'}, scores.get('induction'), "
        "probes.get('needle'), probes.Settings()))"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(runs[0].split()) == 2


test_it_is_the_same_in_another_process = pytest.mark.slow(test_it_is_the_same_in_another_process)


def test_every_score_and_probe_has_its_own() -> None:
    all_scores = [fingerprint(interp.scores.get(name)) for name in interp.scores.names()]
    assert len(set(all_scores)) == len(all_scores)
    assert len(package_code()) == 32


# --- records


def test_a_record_tells_runs_apart(
    worded: Callable[[str], tuple[HookedModel, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = worded("llama")[0], [torch.arange(5)]

    def said(**more: Any) -> dict[str, Any]:
        how = {"seed": 0, "settings": {"n": 2}, "inputs": rows, "methods": (), **more}
        return provenance(model, **how)

    plain = said()
    assert said()["fingerprint"] == plain["fingerprint"]
    assert said(inputs=[torch.arange(5)[None]])["fingerprint"] != plain["fingerprint"]
    for what, other in (
        ("seed", said(seed=1)),
        ("n", said(settings={"n": 3})),
        ("inputs", said(inputs=[torch.arange(6)])),
        ("code", said(methods=[interp.scores.get("sink")])),
    ):
        assert differences(identity(plain), identity(other)) == what
    with model.edit(interp.edits.ScaleHeads({"L0H1": 0.5})):
        half = said()
    with model.edit(interp.edits.ScaleHeads({"L0H1": 0.25})):
        quarter = said()
    assert half["active_edits"][0]["edit"] == "scale_heads" and plain["active_edits"] == []
    assert len({r["fingerprint"] for r in (plain, half, quarter)}) == 3
    monkeypatch.setattr("interp.support.provenance.versions", lambda: {"torch": "1"})
    assert differences(identity(plain), identity(said())) == "versions"


@pytest.mark.slow
def test_the_weights_of_a_real_size_take_a_second() -> None:
    module = torch.nn.Linear(11_600, 11_600, bias=False)  # 135 M numbers
    start = time.process_time()
    weights_hash(module)
    assert time.process_time() - start < 1
