"""Keys and values that wait in the host's memory: when, and that nothing else changes.

There is no GPU here, so the device's size and its streams are played by the test; transformers'
own cache does the moving.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.inputs import host_cache
from interp.inputs.chunks import prefill, watched
from interp_hooks import Question

LENGTH, CHUNK = 83, 20


class Stream:
    """What transformers does with a stream."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, _: object) -> None: ...


class Device:
    """A model whose inputs belong on a GPU, as it is asked."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, torch.device("cuda", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(what, tokens held) for each time that a layer's keys are taken away or brought back."""
    from transformers.cache_utils import DynamicLayer

    moves: list[tuple[str, int]] = []

    def noting(what: str, own: Any) -> Any:
        def act(self: Any) -> None:
            moves.append((what, self.get_seq_length()))
            own(self)

        return act

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream())
    for what in ("offload", "prefetch"):
        monkeypatch.setattr(DynamicLayer, what, noting(what, getattr(DynamicLayer, what)))
    return moves


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "gemma3", "gpt_oss"])
def test_the_statistics_are_the_same(
    name: str, tapped: Any, moved: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer without a window goes away after each chunk, and is brought back before the
    next."""
    model, _ = tapped(name)
    ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    asked = Question(frozenset({"max", "entropy", "distance"}))
    monkeypatch.setattr(host_cache, "free", lambda _: 1000)
    found: list[list[Any]] = [[], []]
    with torch.no_grad():
        watched(model, asked, found[0].append, ids, None, CHUNK)
        assert not moved  # on a CPU
        watched(Device(model), asked, found[1].append, ids, None, CHUNK)
    chunks = -(-LENGTH // CHUNK)
    kinds = getattr(model.module.config, "layer_types", None) or ["full_attention"] * model.n_layers
    full = kinds.count("full_attention")
    if name == "mistral":  # a window in every layer, so that nothing needs to go
        full = 0
    assert [what for what, _ in moved].count("offload") == full * chunks
    if full:
        assert max(held for what, held in moved if what == "offload") == LENGTH
        assert [what for what, _ in moved].count("prefetch") >= full * (chunks - 1)
    for one, other in zip(*found, strict=True):
        for what, value in one.rows.items():
            torch.testing.assert_close(other.rows[what], value)


def test_only_where_there_is_no_room(tapped: Any, moved: list[Any], monkeypatch: Any) -> None:
    """More than half of what is free; and never in a block whose caches are given."""
    model, _ = tapped("llama")
    away = Device(model)
    need = host_cache.bytes_of_keys(away, 2, LENGTH)
    kv = model.sites[0].n_kv_heads * model.sites[0].d_head * model.n_layers
    assert need == 2 * 2 * LENGTH * kv * 4  # keys and values, rows, float32
    for there, expected in ((2 * need, False), (2 * need - 1, True)):
        monkeypatch.setattr(host_cache, "free", lambda _, there=there: there)
        assert (host_cache.host_cache(away, 2, LENGTH) is not None) is expected
        assert host_cache.host_cache(model, 2, LENGTH) is None
    from transformers import DynamicCache

    with model.caching(DynamicCache):
        assert host_cache.host_cache(away, 2, LENGTH) is None


def test_layers_that_share_keys_hold_none(tapped: Any, monkeypatch: Any) -> None:
    """transformers gives such layers no place in the cache."""
    import transformers

    model, _ = tapped("llama")
    whole = host_cache.bytes_of_keys(model, 1, LENGTH)
    own = transformers.DynamicCache

    def shorter(**settings: Any) -> Any:
        made = own(**settings)
        del made.layers[1:]
        return made

    monkeypatch.setattr(transformers, "DynamicCache", shorter)
    assert host_cache.bytes_of_keys(model, 1, LENGTH) == whole // model.n_layers


def test_one_forward_keeps_its_keys(tapped: Any, moved: list[Any], monkeypatch: Any) -> None:
    model, _ = tapped("llama")
    monkeypatch.setattr(host_cache, "free", lambda _: 1)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        whole = prefill(Device(model), ids)
        assert not moved
        parts = prefill(Device(model), ids, chunk=16)
    assert moved
    torch.testing.assert_close(parts.logits, whole.logits, atol=2e-5, rtol=1e-4)


def small(name: str) -> Any:
    """A random model of which transformers' cache differs from a list of keys and values."""
    import transformers as t

    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=100, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    if name == "minimax":
        config: Any = t.MiniMaxConfig(
            **sizes, num_hidden_layers=4, num_local_experts=2, block_size=8
        )
        return t.MiniMaxForCausalLM(config)
    config = t.FalconH1Config(
        **sizes, num_hidden_layers=2, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16,
        mamba_d_state=8, mamba_n_groups=1,
    )  # fmt: skip
    return t.FalconH1ForCausalLM(config)


@pytest.mark.parametrize("name", ["minimax", "falcon_h1"])
@torch.no_grad()
def test_models_with_caches_of_their_own_keep_them(
    name: str, moved: list[Any], monkeypatch: Any
) -> None:
    """One insists on its own class, another's layers have a state beside their keys."""
    from interp_hooks import hook

    model = hook(small(name).eval(), name=name)
    monkeypatch.setattr(host_cache, "free", lambda _: 1)
    ids = torch.arange(3, 40)[None]
    wanted = prefill(model, ids, chunk=16)
    found = prefill(Device(model), ids, chunk=16)
    assert not moved
    torch.testing.assert_close(found.logits, wanted.logits)
    # all layers that keep every token count: of 4, minimax has two
    assert host_cache.bytes_of_keys(model, 1, 40) == 2 * 40 * (2 * 2 * 16) * 4


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_than_cudas_keep_them(kind: str, tapped: Any) -> None:
    model, _ = tapped("llama")
    away = Device(model)
    away.device = torch.device(kind)
    assert host_cache.host_cache(away, 2, LENGTH) is None
