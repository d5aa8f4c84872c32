"""Models that never call transformers' attention interface: what the second tap sees and changes.

The definition is the untouched model's own attentions (`output_attentions=True`), in float64, and
what its output projection reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_own import CAUSAL, ENCODERS, FUSED, build, eager

from interp.edits import Ablate, ScaleHeads, ZeroTuning
from interp.errors import TapError
from interp_hooks import Question, hook

#: two texts, the second padded by three on the left
LENGTH, PADDING = 12, 3


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], tuple[Any, Any, Any]]:
    """name → (the model, one that is never tapped, the tapped model)."""
    cache: dict[str, tuple[Any, Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any, Any]:
        if name not in cache:
            made = {**CAUSAL, **ENCODERS}[name]
            module = build(made)
            cache[name] = module, eager(made, module), hook(module)
        return cache[name]

    return get


def texts(left: bool = True, name: str = "") -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = int(not left)
    inputs = dict(input_ids=ids, attention_mask=mask)
    if name in ("gpt_neo", "xglm"):  # learned positions: counted from the mask, as `generate` does
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return inputs


def attentions(model: Any, **inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    return [a.double() for a in out.attentions]


def entropy(a: torch.Tensor) -> torch.Tensor:
    return -(a * torch.where(a > 0, a.log(), 0)).sum(-1)


def projection(model: Any, site: Any, name: str) -> torch.nn.Module:
    attention = model.get_submodule(site.path)
    return next(m for path, m in attention.named_modules() if path == CAUSAL[name][2])


@contextmanager
def reading(
    module: torch.nn.Module, write: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Iterator[list[torch.Tensor]]:
    """What a projection reads, (batch, tokens, d_model), replaced by `write`'s answer."""
    seen: list[torch.Tensor] = []

    def note(_: Any, args: tuple) -> tuple | None:
        seen.append(args[0].detach().clone())
        return None if write is None else (write(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_statistics_are_those_of_the_models_own_attentions(
    loaded: Any, name: str, padded: bool
) -> None:
    _, untouched, model = loaded(name)
    inputs = texts(padded, name)
    if name == "squeezebert":
        pytest.skip("hands over logits for attentions")
    own = attentions(untouched, **inputs)
    with torch.no_grad(), model.observe("entropy", "max", "received") as seen:
        tapped = model(**inputs)[0]
        plain = untouched(**inputs)[0]
    rows = inputs["attention_mask"].bool()
    torch.testing.assert_close(tapped[rows], plain[rows], rtol=1e-4, atol=1e-4)
    assert len(own) == len(model.sites)
    for site, a in zip(model.sites, own, strict=True):
        if a.shape[2] != LENGTH:  # Funnel has pooled its tokens
            continue
        real = rows[:, None].expand(a.shape[:3])
        got = seen[site.layer].entropy.double()
        torch.testing.assert_close(got[real], entropy(a)[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            seen[site.layer].max.double()[real], a.amax(-1)[real], rtol=1e-4, atol=1e-5
        )
        if (name in CAUSAL and name != "gpt_neo") or (not padded and name not in CAUSAL):
            sees = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
            sees = sees.tril() if name in CAUSAL else sees
            counts = (rows[:, None, :, None] & rows[:, None, None, :] & sees).sum(2)
            received = (a * rows[:, None, :, None]).sum(2) / counts.clamp_min(1)
            keys = rows[:, None].expand(received.shape)
            torch.testing.assert_close(
                seen[site.layer].received.double()[keys], received[keys], rtol=1e-4, atol=1e-5
            )


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_z_and_one_gain(loaded: Any, name: str) -> None:
    _, untouched, model = loaded(name)
    site = model.sites[-1]
    inputs = texts(name=name)
    rows = inputs["attention_mask"].bool()
    with model.capture_z() as z:
        model(**inputs)
    with reading(projection(untouched, site, name)) as read:
        plain = untouched(**inputs)[0]
    torch.testing.assert_close(
        z[site.layer].flatten(2)[rows], read[0].view(2, LENGTH, -1)[rows], rtol=1e-4, atol=1e-5
    )

    def scaled(read: torch.Tensor) -> torch.Tensor:
        by_head = read.reshape(*read.shape[:-1], 4, -1).clone()
        by_head[..., 2, :] *= 0.3
        return by_head.reshape(read.shape)

    with reading(projection(untouched, site, name), scaled):
        wanted = untouched(**inputs)[0]
    with model.edit(ScaleHeads({(site.layer, 2): 0.3})):
        given = model(**inputs)[0]
    torch.testing.assert_close(given[rows], wanted[rows], rtol=1e-4, atol=1e-4)
    assert float((given - plain)[rows].abs().max()) > 1e-3
    after = model(**inputs)[0]
    torch.testing.assert_close(after[rows], plain[rows], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "gpt_neo"])
def test_zero_tuning(loaded: Any, name: str) -> None:
    """a₀' = γ a₀ / D, a_i' = a_i / D, D = (γ − 1) a₀ + 1, in the first layer."""
    _, untouched, model = loaded(name)
    inputs, gamma = texts(name=name), 3.0
    rows = inputs["attention_mask"].bool()
    a = attentions(untouched, **inputs)[0]
    calls: list[Any] = []
    with model.watch(Question(call=True), lambda stats: calls.append(stats.call)):
        model(**inputs)
    v = calls[0].value.double()
    v = v.repeat_interleave(a.shape[1] // v.shape[1], 1)
    first = torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool)
    first[0, ..., 0] = first[1, ..., PADDING] = True
    new = torch.where(first, gamma * a, a)
    new = new / ((gamma - 1) * (a * first).sum(-1, keepdim=True) + 1)
    site = model.sites[0]
    with (
        model.edit(ZeroTuning(gamma, heads=tuple((0, h) for h in range(4)))),
        reading(projection(model.module, site, name)) as read,
    ):
        model(**inputs)
    wanted = (new @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(
        read[0].view(2, LENGTH, -1).double()[rows], wanted[rows], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_cached_decode_and_generate(loaded: Any, name: str) -> None:
    _, untouched, model = loaded(name)
    inputs = texts(name=name)
    whole = attentions(untouched, **inputs)
    cut = {k: v[:, :8] for k, v in inputs.items()}
    with model.observe("entropy") as seen:
        out = model(**cut, use_cache=True)
        for i in range(8, LENGTH):
            step = dict(
                input_ids=inputs["input_ids"][:, i : i + 1],
                attention_mask=inputs["attention_mask"][:, : i + 1],
            )
            if name in ("gptj", "codegen", "gpt_neo", "xglm"):  # as `generate` does
                step["position_ids"] = step["attention_mask"].sum(1, keepdim=True) - 1
            out = model(**step, past_key_values=out.past_key_values, use_cache=True)
    if name not in ("gptj", "codegen"):  # positions under padding are the caller's
        real = inputs["attention_mask"].bool()[:, None].expand(whole[1].shape[:3])
        got = seen[1].entropy.double()
        torch.testing.assert_close(got[real], entropy(whole[1])[real], rtol=1e-3, atol=1e-4)
    assert seen[1].entropy.shape[2] == LENGTH
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    inputs.pop("position_ids", None)
    wanted = untouched.generate(**inputs, **settings)
    with model.observe("entropy"):
        assert bool((model.generate(**inputs, **settings) == wanted).all())
    with model.edit(Ablate([(0, 1)])):
        edited = model.generate(**inputs, **settings)
    assert edited.shape == wanted.shape


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon"])
def test_gradients_are_those_of_the_model(loaded: Any, name: str) -> None:
    _, untouched, model = loaded(name)
    grads = []
    for one in (untouched, model):
        weight = next(p for p in getattr(one, "module", one).parameters() if p.ndim == 2)
        with model.observe("entropy"):
            (grad,) = torch.autograd.grad(one(**texts(False))[0].sum(), weight)
        grads.append(grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "gptj", "xglm"])
def test_attentions_handed_over_in_a_block_are_the_edited_ones(loaded: Any, name: str) -> None:
    _, untouched, model = loaded(name)
    inputs = texts(False)
    a = attentions(untouched, **inputs)[0]
    with model.edit(ZeroTuning(3.0)):
        out = model(**inputs, output_attentions=True)
    first = torch.zeros(1, 1, 1, LENGTH, dtype=torch.bool)
    first[..., 0] = True
    new = torch.where(first, 3 * a, a) / (2 * (a * first).sum(-1, keepdim=True) + 1)
    torch.testing.assert_close(out.attentions[0].double(), new, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_is_tapped_in_the_way_that_it_has_chosen() -> None:
    module = build(FUSED)
    model, inputs = hook(module), texts(False)
    plain = module(**inputs).logits
    with model.capture_z() as z, model.observe("key_mass") as seen:
        tapped = model(**inputs).logits
    torch.testing.assert_close(tapped, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[1].key_mass, torch.ones_like(seen[1].key_mass))
    with reading(module.transformer.h[1].self_attention.dense) as read:
        module(**inputs)
    torch.testing.assert_close(z[1].flatten(2), read[0], rtol=1e-4, atol=1e-5)


def test_multi_query_keys_are_one_head(loaded: Any) -> None:
    _, _, model = loaded("falcon")
    assert [s.n_kv_heads for s in model.sites] == [1, 1]


def test_nothing_stays_on_the_model(loaded: Any) -> None:
    module, _, model = loaded("bloom")
    before = {
        path: (len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m))
        for path, m in module.named_modules()
    }
    with pytest.raises(ZeroDivisionError), torch.no_grad(), model.observe("entropy"):
        model(**texts())
        raise ZeroDivisionError
    assert before == {
        path: (len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m))
        for path, m in module.named_modules()
    }
    assert not any(forward for _, _, forward in before.values())


@pytest.mark.parametrize("kind", ["rwkv", "mamba", "fnet", "reformer"])
def test_models_without_softmax_attention_are_refused(kind: str) -> None:
    configs: dict[str, Any] = dict(
        rwkv=("RwkvForCausalLM", dict(hidden_size=32, num_hidden_layers=2)),
        mamba=("MambaForCausalLM", dict(hidden_size=32, num_hidden_layers=2, state_size=4)),
        fnet=("FNetForMaskedLM", dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48)),
        reformer=(
            "ReformerModelWithLMHead",
            dict(
                is_decoder=True,
                hidden_size=32,
                attn_layers=["local"],
                num_attention_heads=2,
                attention_head_size=16,
                feed_forward_size=32,
                axial_pos_embds=False,
                local_attn_chunk_length=7,
                max_position_embeddings=64,
            ),
        ),
    )
    name, values = configs[kind]
    kinds = getattr(hf, name)
    with pytest.raises(TapError, match=r"attention|AttentionInterface"):
        hook(kinds(kinds.config_class(vocab_size=101, **values)).eval())
