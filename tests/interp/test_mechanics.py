"""Direct logit attribution, token attributions and their agreement with attention, against plain
eager references."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import mechanics, tasks
from interp.errors import InputError, TapError, UnknownNameError
from interp.evaluation.accuracy import sample
from interp.results.head_table import KEYS
from interp.support.statistics import kendall, spearman
from interp.tasks.task import Instance
from interp_hooks import HookedModel, hook

Worded = Callable[[str], tuple[HookedModel, Any]]
IDS = torch.arange(18).reshape(2, 9) * 29 % 101
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0


# --- direct logit attribution
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "qwen2", "qwen3", "opt", "neox", "gemma2", "olmo2", "gpt_oss"]
)
def test_parts_sum_to_the_logits(name: str) -> None:
    """Against the logits of an untouched eager twin, at padded and unpadded rows."""
    module = tiny.build(name, seed=2)
    model = hook(module, name=name)
    with torch.no_grad():
        ids = (MASK.cumsum(-1) - 1).clamp_min(0)
        own = (
            {} if name == "opt" else dict(position_ids=ids)
        )  # OPT counts positions from the mask itself
        logits = tiny.eager(module)(input_ids=IDS, attention_mask=MASK, **own).logits.double()
    rows, columns, tokens = (
        torch.tensor([0, 0, 1]),
        torch.tensor([4, 8, 8]),
        torch.tensor([17, 80, 3]),
    )
    vocabulary = model.vocabulary()
    found = mechanics.direct(model, IDS, MASK, vocabulary.W_U[:, tokens].T, rows, columns)
    wanted = logits[rows, columns, tokens]
    if name == "gemma2":  # contributions are to what the softcap is taken of
        wanted = 30 * torch.atanh(wanted / 30)
    torch.testing.assert_close(found.total, wanted, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.sum(), found.total, atol=1e-5, rtol=1e-6)
    assert found.heads[1].shape == (3, 4)
    sizes = torch.stack([found.heads[layer].abs().mean() for layer in range(2)])
    assert (
        sizes.min() > 1e-3
        and found.mlp[0].abs().mean() > 1e-3
        and found.embedding.abs().mean() > 1e-3
    )
    if name in ("gpt2", "neox", "opt", "gpt_oss"):
        assert found.attention_bias[0].abs().mean() > 1e-3
    if name in ("gpt2", "neox", "opt"):
        assert found.bias.abs().mean() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_heads_part_is_written_out(name: str) -> None:
    """z taken at the output projection, W_O and the final norm's formula by hand."""
    module = tiny.build(name, seed=4)
    plain = tiny.eager(module)
    z: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda value: z.setdefault(layer, value)

    with torch.no_grad(), tiny.rewriting_z(plain, 0, keep(0)), tiny.rewriting_z(plain, 1, keep(1)):
        hidden: list[torch.Tensor] = []
        norm = plain.model.norm if name == "llama" else plain.transformer.ln_f
        handle = norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        plain(input_ids=IDS)
        handle.remove()
    x, gain = hidden[0][:, -1].double(), norm.weight.detach().double()
    token = torch.tensor([8, 60])
    u = plain.lm_head.weight.detach()[token].double()
    found = mechanics.direct(hook(module), IDS, None, u)
    for layer in range(2):
        out = tiny.output_module(tiny.layers(plain)[layer]).weight.detach().double()
        out = out.T if name == "llama" else out  # (heads · d_head, d_model)
        for head in range(4):
            r = z[layer][:, -1, head].double() @ out[8 * head : 8 * head + 8]
            if name == "llama":
                normed = (
                    gain
                    * r
                    / (x.square().mean(-1, keepdim=True) + plain.config.rms_norm_eps).sqrt()
                )
            else:
                spread = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                normed = gain * (r - r.mean(-1, keepdim=True)) / spread
            torch.testing.assert_close(
                found.heads[layer][:, head], (normed * u).sum(-1), atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformer_lens_gives_the_same_parts(name: str) -> None:
    pytest.importorskip("transformer_lens")
    from prompts import hooked_transformer

    module = tiny.build(name, seed=5)
    one, other = hook(module), hook(hooked_transformer(module))
    u = one.vocabulary().W_U[:, [4, 90]].T
    a, b = (mechanics.direct(m, IDS, None, u) for m in (one, other))
    torch.testing.assert_close(b.sum(), b.total, atol=1e-4, rtol=1e-4)
    for layer in range(2):
        torch.testing.assert_close(b.heads[layer], a.heads[layer], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(b.mlp[layer], a.mlp[layer], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "task"), [("llama", "ioi"), ("gpt2", "induction"), ("opt", "greater_than")]
)
def test_direct_logits_sum_to_the_metric(worded: Worded, name: str, task: str) -> None:
    model, plain = worded(name)
    frame = mechanics.direct_logits(model, task, n=5, seed=1)
    metrics, raised = [], []
    for instance in tasks.get(task).sample(model.tokenizer, 5, 1):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([instance.ids])).logits[0].double()
        values, alone = [], []
        for p, right, wrong in zip(
            instance.positions, instance.accept, instance.wrong, strict=True
        ):
            alone.append(float(logits[p, list(right)].max() - logits[p].mean()))
            rivals = logits[p, list(wrong)] if wrong else logits[p]
            values.append(float(logits[p, list(right)].max() - rivals.mean()))
        metrics.append(np.mean(values))
        raised.append(np.mean(alone))
    assert frame.direct_right.sum() == pytest.approx(np.mean(raised), abs=1e-4)
    np.testing.assert_allclose(frame.direct_right - frame.direct_wrong, frame.direct, atol=1e-9)
    assert frame.direct.sum() == pytest.approx(np.mean(metrics), abs=1e-4)
    assert frame.attrs["metric"] == pytest.approx(np.mean(metrics), abs=1e-4)
    assert list(frame.columns) == [
        *KEYS,
        "component",
        "direct",
        "direct_stderr",
        "direct_right",
        "direct_wrong",
    ]
    assert frame.component.value_counts().to_dict() == dict(
        head=8, mlp=2, attention_bias=2, embedding=1, bias=1
    )
    heads = frame[frame.component == "head"]
    assert heads.direct.abs().min() > 0 and (heads.direct_stderr > 0).all()


def test_branches_that_are_scaled_are_refused() -> None:
    config = hf.GraniteConfig(vocab_size=101, **tiny.GQA, residual_multiplier=0.5)
    torch.manual_seed(0)
    model = hook(hf.GraniteForCausalLM(config).eval(), name="granite")
    with pytest.raises(TapError, match="Layer 0 of granite does more"):
        mechanics.direct(model, IDS, None, torch.ones(2, 32))


def test_bad_arguments(worded: Worded) -> None:
    model = worded("llama")[0]
    for call in (
        lambda: mechanics.direct(model, IDS, None, torch.ones(3, 32)),
        lambda: mechanics.direct(model, IDS, None, torch.ones(2, 32), rows=torch.tensor([0, 1])),
        lambda: mechanics.agreement(model, n=1, steps=0),
        lambda: mechanics.agreement(model, n=1, baseline="noise"),
        lambda: mechanics.agreement(model, n=1, seed=-1),
    ):
        with pytest.raises(InputError):
            call()
    with pytest.raises(UnknownNameError):
        mechanics.direct_logits(model, "no such task")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=15),
    st.booleans(),
)
def test_rank_correlations_are_scipys(pairs: list[tuple[int, int]], ties: bool) -> None:
    a, b = np.array(pairs, dtype=float).T
    if not ties:
        a, b = a + np.linspace(0, 0.4, len(a)), b - np.linspace(0, 0.3, len(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(kendall(a, b)) and math.isnan(spearman(a, b))
        return
    assert kendall(a, b) == pytest.approx(scipy.stats.kendalltau(a, b).statistic, abs=1e-12)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-9)


def by_embeddings(
    plain: Any, instance: Instance, embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows,) metric and its gradient (rows, tokens, d) of an untouched model fed with
    embeddings."""
    leaf = embeds.clone().requires_grad_()
    logits = plain(inputs_embeds=leaf).logits[:, instance.positions[0]]
    wrong = list(instance.wrong[0])
    rivals = logits[:, wrong] if wrong else logits
    metric = logits[:, list(instance.accept[0])].mean(1) - rivals.mean(1)
    (gradient,) = torch.autograd.grad(metric.sum(), leaf)
    return metric.detach().double(), gradient.double()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attributions_are_their_definitions(worded: Worded, name: str) -> None:
    model, plain = worded(name)
    instance = sample(model, "ioi", 1, 3)[1][0]
    table = plain.get_input_embeddings().weight.detach()
    e = table[list(instance.prompt)]
    b = table.mean(0).expand_as(e)
    metric, gradient = by_embeddings(plain, instance, e[None])
    found = mechanics.attributions(model, instance, steps=64)
    assert found.metric == pytest.approx(float(metric[0]), abs=1e-4)
    np.testing.assert_allclose(found.gradient, (e * gradient[0]).sum(-1), atol=1e-4, rtol=1e-3)
    # the integral by the midpoint rule, in steps that shrink towards the baseline
    edges = np.linspace(0, 1, 401) ** 2
    alpha, width = torch.tensor((edges[1:] + edges[:-1]) / 2), torch.tensor(np.diff(edges))
    parts = []
    for some, weight in zip(alpha.split(200), width.split(200), strict=True):
        slope = by_embeddings(plain, instance, b + some[:, None, None].float() * (e - b))[1]
        parts.append((slope * weight[:, None, None]).sum(0))
    wanted = ((e - b) * torch.stack(parts).sum(0)).sum(-1).numpy()
    np.testing.assert_allclose(found.integrated, wanted, atol=2e-3 * np.abs(wanted).max())
    assert found.baseline == pytest.approx(
        float(by_embeddings(plain, instance, b[None])[0][0]), abs=1e-4
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "neox"])
def test_integrated_gradients_are_complete(worded: Worded, name: str) -> None:
    model = worded(name)[0]
    for instance in sample(model, "ioi", 3, 0)[1]:
        found = mechanics.attributions(model, instance, steps=64)
        assert abs(found.metric - found.baseline) > 1e-2
        assert found.gap < 0.01
        assert found.gap == pytest.approx(
            abs(found.integrated.sum() - (found.metric - found.baseline))
            / abs(found.metric - found.baseline)
        )


@torch.no_grad()
def linear_model(size: int) -> Any:
    """A Llama that is linear in its embeddings: no norms, no MLPs, queries of 0 (uniform
    attention)."""
    module = tiny.build("llama", size, num_hidden_layers=1, num_key_value_heads=4)
    layer = module.model.layers[0]
    layer.input_layernorm, module.model.norm = torch.nn.Identity(), torch.nn.Identity()
    layer.self_attn.q_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    return module


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("baseline", ["mean", "zero"])
def test_a_linear_model_is_attributed_exactly(tokenizer: Any, steps: int, baseline: str) -> None:
    module = linear_model(len(tokenizer))
    model = hook(module, tokenizer=tokenizer)
    instance = sample(model, "ioi", 1, 0)[1][0]
    attention = module.model.layers[0].self_attn
    e = module.model.embed_tokens.weight.detach().double()
    unembed = module.lm_head.weight.detach().double()
    u = unembed[instance.accept[0][0]] - unembed[list(instance.wrong[0])].mean(0)
    tokens = list(instance.prompt)
    through = (
        u
        @ attention.o_proj.weight.detach().double()
        @ attention.v_proj.weight.detach().double()
        / len(tokens)
    )
    slopes = through.repeat(len(tokens), 1)  # every key has weight 1/tokens
    slopes[-1] += u
    away = e.mean(0) if baseline == "mean" else torch.zeros(32, dtype=torch.float64)
    found = mechanics.attributions(model, instance, steps, baseline)
    np.testing.assert_allclose(found.gradient, (e[tokens] * slopes).sum(-1), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(
        found.integrated, ((e[tokens] - away) * slopes).sum(-1), atol=1e-4, rtol=1e-4
    )
    assert found.gap < 1e-4


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_agreement_is_its_definition(worded: Worded, name: str, skip_first: bool) -> None:
    model, plain = worded(name)
    n, start = 4, int(skip_first)
    frame = mechanics.agreement(model, "ioi", n, 2, steps=8, skip_first=skip_first)
    taus, rhos, igs, means = [], [], [], []
    for instance in tasks.get("ioi").sample(model.tokenizer, n, 2):
        ids = torch.tensor([instance.prompt])
        weights = [a[0, :, -1, start:].numpy() for a in tiny.attentions(plain, input_ids=ids)[0]]
        e = plain.get_input_embeddings().weight.detach()[ids]
        grad = np.abs((e * by_embeddings(plain, instance, e)[1]).sum(-1)[0].numpy())[start:]
        ig = np.abs(mechanics.attributions(model, instance, 8).integrated)[start:]
        rows = [row for layer in weights for row in layer]
        taus.append([scipy.stats.kendalltau(row, grad).statistic for row in rows])
        rhos.append([scipy.stats.spearmanr(row, grad).statistic for row in rows])
        igs.append([scipy.stats.kendalltau(row, ig).statistic for row in rows])
        means.append([scipy.stats.kendalltau(layer.mean(0), grad).statistic for layer in weights])
    for column, values in (("tau_gradient", taus), ("rho_gradient", rhos), ("tau_ig", igs)):
        np.testing.assert_allclose(frame[column], np.mean(values, 0), atol=1e-9)
        np.testing.assert_allclose(
            frame[f"{column}_stderr"], np.std(values, 0, ddof=1) / n**0.5, atol=1e-9
        )
    layers = frame.attrs["layers"]
    assert [row["layer"] for row in layers] == [0, 1]
    np.testing.assert_allclose(
        [row["tau_gradient"]["mean"] for row in layers], np.mean(means, 0), atol=1e-9
    )
    assert all(
        row["rho_ig"]["low"] <= row["rho_ig"]["mean"] <= row["rho_ig"]["high"] for row in layers
    )
    assert list(frame.columns[:5]) == list(KEYS) and frame.tau_gradient.nunique() > 4
    assert frame.attrs["completeness"] <= frame.attrs["completeness_worst"]


def test_uniform_heads_have_no_agreement(tokenizer: Any) -> None:
    """Attention that weighs all tokens alike has no order: not measured rather than 0."""
    model = hook(linear_model(len(tokenizer)), tokenizer=tokenizer)
    frame = mechanics.agreement(model, n=2, steps=1)
    assert frame[["tau_gradient", "rho_ig"]].isna().all(axis=None)
    assert frame.attrs["layers"][0]["tau_ig"] is None and frame.attrs["notes"] == []


def test_incomplete_attributions_are_told(worded: Worded) -> None:
    frame = mechanics.agreement(worded("llama")[0], n=2, steps=1, baseline="zero")
    assert frame.attrs["completeness"] > 0.01 and "take more" in frame.attrs["notes"][0]


def test_transformer_lens_agrees(tokenizer: Any) -> None:
    pytest.importorskip("transformer_lens")
    from prompts import hooked_transformer

    module = tiny.build("gpt2", len(tokenizer), seed=6)
    one, other = (hook(m, tokenizer=tokenizer) for m in (module, hooked_transformer(module)))
    instance = sample(one, "ioi", 1, 0)[1][0]
    a, b = (mechanics.attributions(m, instance, 16) for m in (one, other))
    np.testing.assert_allclose(b.integrated, a.integrated, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(
        mechanics.agreement(other, n=2, steps=8).tau_ig,
        mechanics.agreement(one, n=2, steps=8).tau_ig,
        atol=0.05,
    )
