"""Procedures: APE against eager attention with explicit positions and mask, guidance against its
formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch

import interp
from interp.edits import Ablate, SoftPAG
from interp.errors import EditError, InputError, UnknownNameError
from interp.procedures import APE, guided_generate, guided_logits
from interp.procedures.ape import merge
from interp.procedures.decoding import Choice, decode
from interp_hooks import hook

FULL = dict(layer_types=["full_attention"] * 2, sliding_window=64)
MODELS = {"llama": {}, "gpt2": {}, "qwen3": {}, "neox": {}, "gemma2": FULL, "gpt_oss": FULL}
PREFIX, CONTEXTS, QUERY = (
    [1, 5, 9],
    [[7, 8, 11, 12], [20, 21], [30, 31, 32, 33, 34, 35]],
    [40, 41, 42],
)


def setup(name: str) -> tuple[Any, Any]:
    """(tapped, untouched eager twin)."""
    model = tiny.build(name, **MODELS[name])
    return hook(model, name=name), tiny.eager(model)


def layout(
    contexts: list[list[int]], query: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition: (ids, position ids, visible (tokens, tokens)). Each context sees the prefix
    and itself, the query everything before it; contexts start at p, the query at p + the longest
    context."""
    ids, places, owner = list(PREFIX), list(range(len(PREFIX))), [0] * len(PREFIX)
    for number, context in enumerate(contexts, 1):
        ids += context
        places += [len(PREFIX) + i for i in range(len(context))]
        owner += [number] * len(context)
    start = len(PREFIX) + max(map(len, contexts))
    ids += query
    places += [start + i for i in range(len(query))]
    owner += [-1] * len(query)
    own = torch.tensor(owner)
    seen = (own[None] == 0) | (own[None] == own[:, None]) | (own[:, None] == -1)
    return torch.tensor([ids]), torch.tensor([places]), seen & torch.ones_like(seen).tril()


def reference(
    twin: Any, contexts: list[list[int]], query: list[int], temperature: float, scale: float
) -> torch.Tensor:
    """(query tokens, vocabulary) in one forward over everything, with attention written out for
    each row."""
    from transformers import AttentionInterface

    ids, places, seen = layout(contexts, query)
    a, b = len(PREFIX), len(PREFIX) + sum(map(len, contexts))

    def attend(
        module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **more: Any
    ) -> tuple[Any, None]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        s = (q @ k.transpose(-1, -2)) * scaling
        if more.get("softcap"):
            s = more["softcap"] * torch.tanh(s / more["softcap"])
        context = torch.zeros(s.shape[-2:], dtype=torch.bool)
        context[b:, a:b] = True  # what the query's rows see of the contexts
        sink = more.get("s_aux")
        extra = torch.full_like(s[..., :1], -torch.inf)
        if sink is not None:
            extra = sink.view(1, -1, 1, 1).expand_as(extra)
        rest = torch.where(seen & ~context, s, -torch.inf)
        total = torch.logaddexp(torch.logsumexp(rest, -1, keepdim=True), extra)
        sharp = torch.where(context, s / temperature, -torch.inf)
        lse = torch.logsumexp(sharp, -1, keepdim=True)
        z_rest = (rest - total).exp() @ v
        z_context = torch.nan_to_num((sharp - lse).exp()) @ v
        raised = torch.where(torch.isinf(lse), -torch.inf, lse * scale * temperature)
        w = torch.softmax(torch.cat([raised, total], -1), -1)
        return (w[..., :1] * z_context + w[..., 1:] * z_rest).transpose(1, 2), None

    AttentionInterface.register("ape_by_hand", attend)
    twin.set_attn_implementation("ape_by_hand")
    try:
        return twin(input_ids=ids, position_ids=places, use_cache=False).logits[0, -len(query) :]
    finally:
        twin.set_attn_implementation("eager")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ape_without_temperature_is_the_model_on_one_context(name: str) -> None:
    model, twin = setup(name)
    text = PREFIX + CONTEXTS[0] + QUERY
    expected = twin(input_ids=torch.tensor([text])).logits[0, -len(QUERY) :]
    got = APE(1, 1).logits(model, PREFIX, CONTEXTS[:1], QUERY)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ape_without_temperature_is_eager_attention_with_explicit_positions_and_mask(
    name: str,
) -> None:
    model, twin = setup(name)
    ids, places, seen = layout(CONTEXTS, QUERY)
    bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    expected = twin(input_ids=ids, position_ids=places, attention_mask=bias).logits[
        0, -len(QUERY) :
    ]
    got = APE(1, 1).logits(model, PREFIX, CONTEXTS, QUERY)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [(0.9, 0.9), (0.8, 1.25)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_ape_is_its_definition(name: str, settings: tuple[float, float]) -> None:
    model, twin = setup(name)
    expected = reference(twin, CONTEXTS, QUERY, *settings)
    got = APE(*settings).logits(model, PREFIX, CONTEXTS, QUERY)
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)
    plain = APE(1, 1).logits(model, PREFIX, CONTEXTS, QUERY)
    assert (got - plain).abs().max() > 1e-3  # the settings do something
    assert model.observers_and_edits() == ([], [])


def test_merging_two_states_is_attention_over_both() -> None:
    torch.manual_seed(0)
    s, v = (
        torch.randn(2, 3, 4, 9, dtype=torch.float64) * 3,
        torch.randn(2, 3, 9, 5, dtype=torch.float64),
    )
    cuts = slice(4), slice(4, 9)
    parts = [
        (torch.softmax(s[..., c], -1) @ v[:, :, c], torch.logsumexp(s[..., c], -1)) for c in cuts
    ]
    torch.testing.assert_close(merge(parts[0], parts[1], 1.0), torch.softmax(s, -1) @ v)


@torch.no_grad()
def test_ape_generates_what_its_logits_say_and_contexts_are_reusable() -> None:
    model, _ = setup("llama")
    encoded = APE().encode(model, PREFIX, CONTEXTS)
    for query in (QUERY, [50]):
        made = encoded.generate(query, max_new_tokens=5).tolist()
        text = list(query)
        for token in made:
            assert int(encoded.logits(text)[-1].argmax()) == token
            text.append(token)
    once = encoded.generate(QUERY, max_new_tokens=8, sample=True, seed=3)
    assert torch.equal(once, encoded.generate(QUERY, max_new_tokens=8, sample=True, seed=3))
    grown = torch.cat([c[0] for c in encoded.layers])
    assert grown.shape[2] == len(PREFIX) + sum(
        map(len, CONTEXTS)
    )  # queries leave the joined cache as it was


def test_ape_encodes_in_groups_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = setup("llama")
    together = APE().logits(model, PREFIX, CONTEXTS, QUERY)
    monkeypatch.setattr("interp.inputs.batches.BUDGET", 1)
    torch.testing.assert_close(
        APE().logits(model, PREFIX, CONTEXTS, QUERY), together, atol=1e-5, rtol=1e-5
    )


def test_ape_on_text(tokenizer: Any, worded: Callable[[str], Any]) -> None:
    model, _ = worded("llama")
    made = APE().generate(
        model, "The old dog", [" saw a cat.", " found the red bird."], " Then", max_new_tokens=3
    )
    assert 1 <= len(made) <= 3


def test_ape_refuses() -> None:
    model, _ = setup("llama")
    with pytest.raises(EditError, match="above 0"):
        APE(0.0)
    with pytest.raises(InputError, match="not empty"):
        APE().encode(model, PREFIX, [])
    with pytest.raises(InputError, match="not empty"):
        APE().encode(model, PREFIX, [[]])
    with pytest.raises(InputError, match="query"):
        APE().logits(model, PREFIX, CONTEXTS, [])
    with pytest.raises(interp.InterpError, match="positions for 128"):
        APE().encode(model, PREFIX, [[5] * 200])
    sliding = hook(tiny.build("mistral"), name="mistral")
    with pytest.raises(InputError, match="plain cache"):
        APE().encode(sliding, PREFIX, CONTEXTS)


@torch.no_grad()
def test_guided_logits_are_the_formula() -> None:
    model, twin = setup("llama")
    ids, edits = torch.randint(0, 101, (2, 9)), [SoftPAG(0.7, ("0.1", "1.2"))]
    plain = twin(input_ids=ids).logits
    with model.edit(*edits):
        perturbed = model.logits(ids)
    got = guided_logits(model, edits, 1.5, ids)
    torch.testing.assert_close(got, plain + 1.5 * (plain - perturbed), atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(
        guided_logits(model, edits, -1.0, ids), perturbed, atol=3e-5, rtol=1e-4
    )
    assert torch.equal(guided_logits(model, edits, 0, ids), model.logits(ids))
    assert model.observers_and_edits() == ([], [])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_guided_generation_without_scale_is_plain_generation(name: str) -> None:
    model, twin = setup(name)
    ids = torch.randint(3, 101, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    twin.generation_config.pad_token_id = 2
    plain = twin.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    made = guided_generate(model, [SoftPAG(1.0)], 0.0, ids, mask, max_new_tokens=6)
    width = min(plain.shape[1], made.shape[1])
    assert torch.equal(plain[:, :width], made[:, :width])


@torch.no_grad()
def test_guided_generation_is_step_by_step_the_guided_prediction() -> None:
    """Also under left padding: each row as it would be alone."""
    model, _ = setup("llama")
    edits = [SoftPAG(1.0, ("1.1",)), Ablate("0.2")]
    ids = torch.randint(3, 101, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    made = guided_generate(model, edits, 2.0, ids, mask, max_new_tokens=4)
    for row, start in ((0, 2), (1, 0)):
        text = ids[row, start:].tolist()
        for token in made[row, 6:].tolist():
            assert (
                int(guided_logits(model, edits, 2.0, torch.tensor([text]))[0, -1].argmax()) == token
            )
            if token == 2:  # the end; what follows is padding
                break
            text.append(token)


def test_edits_are_bound_once_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = setup("llama")
    bound: list[int] = []
    edit = SoftPAG(1.0)
    bind = SoftPAG.bind
    monkeypatch.setattr(
        SoftPAG, "bind", lambda self, model: (bound.append(1), bind(self, model))[1]
    )
    guided_generate(model, [edit], 1.0, QUERY, max_new_tokens=4)
    assert len(bound) == 1


def test_guidance_samples_with_a_seed_and_refuses() -> None:
    model, _ = setup("llama")
    one, two, other = (
        guided_generate(model, [SoftPAG(1.0)], 1.0, QUERY, max_new_tokens=12, sample=True, seed=s)
        for s in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    with pytest.raises(InputError, match="needs edits"):
        guided_generate(model, [], 1.0, QUERY)
    with pytest.raises(InputError, match="empty"):
        guided_generate(model, [SoftPAG(1.0)], 1.0, [])
    with pytest.raises(InputError, match="at least one new token"):
        guided_generate(model, [SoftPAG(1.0)], 1.0, QUERY, max_new_tokens=0)
    with pytest.raises(interp.InterpError, match="L7H0"):
        guided_generate(model, [SoftPAG(1.0, ("7.0",))], 1.0, QUERY)


def test_sampling_follows_temperature_and_top_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, -1)
    for choice, expected in (
        (Choice(True), [0.5, 0.3, 0.15, 0.05]),
        (Choice(True, top_p=0.7), [0.625, 0.375, 0, 0]),
        (Choice(True, top_p=0.01), [1, 0, 0, 0]),
    ):
        drawn = torch.bincount(choice(logits, choice.generator()), minlength=4) / 4000
        torch.testing.assert_close(
            drawn, torch.tensor(expected, dtype=torch.float32), atol=0.03, rtol=0
        )
    cold = Choice(True, temperature=0.05)
    assert bool((cold(logits, cold.generator()) == 0).all())
    with pytest.raises(InputError, match="temperature"):
        Choice(True, temperature=0)


def test_a_text_ends_at_its_end_and_is_padded() -> None:
    script = iter([[2, 5], [6, 2]])
    one_hot = lambda row: torch.nn.functional.one_hot(torch.tensor(row), 8).float()  # noqa: E731
    made = decode(one_hot([4, 4]), lambda tokens: one_hot(next(script)), Choice(), 9, {2}, 7)
    assert made.tolist() == [[4, 2, 7], [4, 5, 2]] and math.isfinite(float(made.sum()))


def test_procedures_by_name() -> None:
    assert interp.procedures.get("ape") is APE
    assert interp.procedures.names() == [
        "ape",
        "cca",
        "damro",
        "guidance",
        "image_guidance",
        "ritual",
        "ritual_plus",
        "route_gating",
    ]
    with pytest.raises(UnknownNameError, match="ape"):
        interp.procedures.get("ap")
