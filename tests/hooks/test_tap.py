"""The tap: changes nothing, sees what eager attention does, edits what it says, and leaves no
trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from prompts import LENGTH, inputs_for, left_padded, padded, tokens

from interp.edits import Ablate, ScaleHeads
from interp_hooks import HookedModel, hook
from interp_hooks.errors import EditError, HeadError, TapError
from interp_kernels import Received

NAMES = list(tiny.CONFIGS)
Tapped = Callable[[str], tuple[HookedModel, Any]]
WIDE = 8


def rows(mask: torch.Tensor) -> torch.Tensor:
    """(batch, 1, queries) bool of real rows, to compare per-head row statistics."""
    return mask.bool()[:, None, :]


def close(
    found: torch.Tensor, wanted: torch.Tensor, keep: torch.Tensor | None = None, atol: float = 2e-5
) -> None:
    if keep is not None:
        keep = keep.expand(wanted.shape)
        assert bool((found[~keep] == 0).all()), "rows of padding are zero"
        found, wanted = found[keep], wanted[keep]
    torch.testing.assert_close(found.double(), wanted.double(), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("side", ["", "left", "right"], ids=["full", "left-padded", "right-padded"])
@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_eager_attention(tapped: Tapped, name: str, side: str) -> None:
    model, plain = tapped(name)
    ids, mask = tokens(), padded(side)
    given = inputs_for(model, ids, mask)
    weights, logits = tiny.attentions(plain, **given)
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, 3, ids.shape, generator=draw)
    pairs = torch.randint(-1, LENGTH, (2, LENGTH, 2), generator=draw)
    pairs[..., 1] = torch.where(pairs[..., 1] == pairs[..., 0], -1, pairs[..., 1])
    subset = torch.rand(2, LENGTH, generator=draw) < 0.5
    sets = {"some": Received(subset), "band": Received(band=(1, 3))}
    asked = (
        "entropy",
        "max",
        "argmax",
        "distance",
        "capped_distance",
        "group_mass",
        "received",
        "pair_mass",
        "topk",
    )
    with (
        torch.no_grad(),
        model.observe(
            *asked, labels=labels, pairs={"p": pairs}, received=sets, cap=3, topk=2
        ) as seen,
    ):
        out = model(**given).logits
    real = mask.bool()
    torch.testing.assert_close(out[real], logits[real], atol=1e-4, rtol=1e-4)
    slots = torch.arange(LENGTH)
    distance = (slots[:, None] - slots).double().abs()
    for layer, full in enumerate(weights):
        sees = tiny.visible(mask, tiny.window_of(plain.config, layer))
        assert bool(
            (full[~sees.expand(full.shape) & real[:, None, :, None]].abs() < 1e-9).all()
        )  # the test's own mask
        a = full * sees
        got, keep = seen[layer], rows(mask)
        entropy = -torch.where(a > 0, a * a.clamp_min(1e-300).log(), 0).sum(-1)
        close(got.entropy, entropy, keep)
        close(got.max, a.amax(-1), keep)
        assert torch.equal(
            got.argmax[keep.expand(a.shape[:3])], a.argmax(-1)[keep.expand(a.shape[:3])]
        )
        close(got.distance, (a * distance).sum(-1), keep, 1e-4)
        close(got.capped_distance, (a * distance.clamp(max=3)).sum(-1), keep)
        for g in range(3):
            close(got.group_mass[..., g], (a * (labels == g)[:, None, None]).sum(-1), keep)
        picked = (
            a.gather(-1, pairs.clamp_min(0)[:, None].expand(-1, 4, -1, -1)) * (pairs >= 0)[:, None]
        )
        close(got.pair_mass["p"], picked.sum(-1), keep)
        best = a.topk(2, -1)
        close(got.topk_prob[..., 0], best.values[..., 0], keep)
        two = (sees.sum(-1) >= 2).expand(a.shape[:3])
        assert torch.equal(got.topk_index[two], best.indices[two])
        band = ((slots[:, None] - slots) >= 1) & ((slots[:, None] - slots) <= 3)
        for key, counted in (
            ("all", sees),
            ("some", sees & subset[:, None, :, None]),
            ("band", sees & band),
        ):
            counted = counted.double()
            close(got.received_by(key), (a * counted).sum(2) / counted.sum(2).clamp_min(1))
        close(got.received, got.received_by("all"))


def test_sink_logits_leave_weights_below_one(tapped: Tapped) -> None:
    """GPT-OSS: A sums to less than one over the real keys, and what is missing is the sink's
    share."""
    model, plain = tapped("gpt_oss")
    ids = tokens()
    with (
        torch.no_grad(),
        model.observe("group_mass", "entropy", labels=torch.zeros_like(ids)) as seen,
    ):
        model(input_ids=ids)
    weights, _ = tiny.attentions(plain, input_ids=ids)
    total = seen[0].group_mass[..., 0]
    assert float(total.max()) < 1 + 1e-6 and float(total.mean()) < 0.95
    close(total, weights[0].sum(-1))


def test_reducers_agree_with_raw_rows(tapped: Tapped) -> None:
    model, _ = tapped("mistral")
    ids, mask = tokens(), left_padded(True)
    names = ("entropy", "max", "group_mass")
    labels = torch.arange(LENGTH).expand(2, -1) % 3
    with (
        torch.no_grad(),
        model.observe(*names, labels=labels) as raw,
        model.observe(*names, labels=labels, reduce="mean") as mean,
        model.observe(*names, labels=labels, reduce="histogram") as histogram,
    ):
        model(**inputs_for(model, ids, mask))
    real = mask.bool()
    for row in range(2):
        kept = raw[1].entropy[row][:, real[row]]
        close(mean[1].entropy[row], kept.mean(-1))
        close(mean[1].group_mass[row], raw[1].group_mass[row][:, real[row]].mean(1))
        for head in range(4):
            wanted = torch.histc(raw[1].max[row, head][real[row]], 50, 0.0, 1.0)
            assert torch.equal(histogram[1].max[row, head], wanted)
        counts = torch.stack([torch.histc(h, 48, 0.0, 12.0) for h in kept])
        assert torch.equal(histogram[1].entropy[row], counts)
    assert histogram[1].group_mass.shape == (2, 4, 3, 50)
    assert torch.equal(
        histogram[1].group_mass.sum(-1), real.sum(-1)[:, None, None].expand(-1, 4, 3).float()
    )


def test_reducer_counts_every_forward(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    with torch.no_grad(), model.observe("max", reduce="mean") as mean, model.observe("max") as raw:
        model(input_ids=tokens(1))
        model(input_ids=tokens(2, length=9))
    assert raw[0].max.shape[-1] == LENGTH + 9
    close(mean[0].max, raw[0].max.mean(-1))


# --- caches and generation
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_generate_rows_equal_one_full_forward(tapped: Tapped, name: str) -> None:
    model, plain = tapped(name)
    ids, mask, new = tokens(), left_padded(True), 5
    given = dict(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    with torch.no_grad(), model.observe("entropy", "argmax", "max", "received") as seen:
        out = model.generate(**given, pad_token_id=0)
    assert torch.equal(out, plain.generate(**given, pad_token_id=0))
    assert [(c.start, c.stop, c.q_start) for c in seen.calls] == [
        (0, LENGTH, 0), *[(LENGTH + i, LENGTH + i + 1, LENGTH + i) for i in range(new - 1)]
    ]  # fmt: skip
    whole = torch.cat([mask, torch.ones(2, new - 1, dtype=torch.long)], 1)
    weights, _ = tiny.attentions(plain, **inputs_for(model, out[:, :-1], whole))
    keep = rows(whole).expand(2, 4, -1)
    for layer, full in enumerate(weights):
        sees = tiny.visible(whole, tiny.window_of(plain.config, layer))
        a = full * sees
        assert torch.equal(seen[layer].queries, whole.bool())
        assert torch.equal(
            seen[layer].argmax[keep], a.argmax(-1)[keep]
        )  # absolute slots, also in sliding caches
        close(seen[layer].max, a.amax(-1), keep, 1e-4)
        close(seen[layer].received, a.sum(2) / sees.sum(2).clamp_min(1), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss"])
def test_chunked_prefill_equals_one_forward(tapped: Tapped, name: str) -> None:
    model, _ = tapped(name)
    ids, mask = tokens(), left_padded(True)
    given = inputs_for(model, ids, mask)
    with torch.no_grad(), model.observe("entropy", "argmax", "received") as whole:
        logits = model(**given).logits
    cache, parts = None, []
    with torch.no_grad(), model.observe("entropy", "argmax", "received") as seen:
        for a, b in ((0, 8), (8, 11), (11, LENGTH)):
            part = {k: v[:, a:b] for k, v in given.items()}
            part["attention_mask"] = mask[:, :b]
            out = model(**part, past_key_values=cache, use_cache=True)
            cache, _ = out.past_key_values, parts.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], logits[real], atol=1e-4, rtol=1e-4)
    assert [c.q_start for c in seen.calls] == [0, 8, 11]
    for layer in range(2):
        close(seen[layer].entropy, whole[layer].entropy, rows(mask), 1e-4)
        assert torch.equal(seen[layer].argmax, whole[layer].argmax)
        close(seen[layer].received, whole[layer].received, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_static_cache_equals_one_forward(tapped: Tapped, name: str) -> None:
    model, _ = tapped(name)
    ids, mask = tokens(), left_padded(True)
    given = inputs_for(model, ids, mask)
    cache = hf.StaticCache(config=model.module.config, max_cache_len=LENGTH + 6)
    with torch.no_grad(), model.observe("entropy", "argmax") as whole:
        model(**given)
    with torch.no_grad(), model.observe("entropy", "argmax") as seen:
        model(**{k: v[:, :10] for k, v in given.items()}, past_key_values=cache, use_cache=True)
        for i in range(10, LENGTH):
            step = {k: v[:, i : i + 1] for k, v in given.items()}
            model(
                **dict(step, attention_mask=mask[:, : i + 1]), past_key_values=cache, use_cache=True
            )
    for layer in range(2):
        close(seen[layer].entropy, whole[layer].entropy, rows(mask), 1e-4)
        assert torch.equal(seen[layer].argmax, whole[layer].argmax)


# --- what is left behind
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_everything_is_put_back(name: str) -> None:
    module = tiny.build(name)
    chosen = module.config._attn_implementation
    ids = tokens()
    with torch.no_grad():
        before = module(input_ids=ids).logits
        model = hook(module)
        assert module.config._attn_implementation == chosen
        with model.observe("max"):
            assert module.config._attn_implementation != chosen
            model(input_ids=ids)
        assert module.config._attn_implementation == chosen
        assert torch.equal(module(input_ids=ids).logits, before)
        with (
            pytest.raises(RuntimeError, match="mine"),
            model.edit(ScaleHeads({"0.0": 0.0})),
            model.capture_z(),
        ):
            model(input_ids=ids)
            raise RuntimeError("mine")
        with pytest.raises(RuntimeError, match="mine"), model.capture_resid():
            raise RuntimeError("mine")
        assert module.config._attn_implementation == chosen
        assert model.observers_and_edits() == ([], [])
        assert torch.equal(module(input_ids=ids).logits, before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_failure_inside_a_layer_leaves_nothing(tapped: Tapped) -> None:
    model, plain = tapped("llama")

    def fail(*_: Any) -> None:
        raise IndexError("of the layer")

    hooked = model.module.model.layers[1].mlp.register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(IndexError), model.observe("max"):
        model(input_ids=tokens())
    hooked.remove()
    with torch.no_grad():
        assert model.module.config._attn_implementation == "sdpa"
        torch.testing.assert_close(
            model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits, atol=1e-5, rtol=1e-4
        )


def test_blocks_nest(tapped: Tapped) -> None:
    """Outer observers see inner forwards; an inner edit ends with its block, the outer one goes
    on."""
    model, plain = tapped("llama")
    ids = tokens()
    with torch.no_grad():
        untouched = model(input_ids=ids).logits
        with model.observe("max") as outer, model.edit(ScaleHeads({"1.0": 0.5})):
            half = model(input_ids=ids).logits
            with model.edit(ScaleHeads({"1.0": 0.5})):
                quarter = model(input_ids=ids).logits
            again = model(input_ids=ids).logits
            with model.clean():
                free = model(input_ids=ids).logits
        with model.edit(ScaleHeads({"1.0": 0.25})):
            direct = model(input_ids=ids).logits
        with tiny.rewriting_z(plain, 1, lambda z: z * torch.tensor([0.5, 1, 1, 1])[:, None]):
            wanted = plain(input_ids=ids).logits
    torch.testing.assert_close(half, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(half, again)
    torch.testing.assert_close(quarter, direct, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(free, untouched, atol=1e-5, rtol=1e-4)
    assert outer[0].max.shape[-1] == 3 * LENGTH  # not the clean run


# --- z, weights, residual stream
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_z_through_head_weights_is_the_attention_output(tapped: Tapped, name: str) -> None:
    model, plain = tapped(name)
    ids = tokens()
    outputs: dict[int, torch.Tensor] = {}
    handles = [
        output_module.register_forward_hook(lambda m, a, out, i=i: outputs.__setitem__(i, out))
        for i, output_module in enumerate(map(tiny.output_module, tiny.layers(plain)))
    ]
    with torch.no_grad():
        plain(input_ids=ids)
        with model.capture_z() as z:
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    for layer in range(2):
        weights = model.head_weights(layer)
        total = weights.result(z[layer]).sum(2) + (0 if weights.b_O is None else weights.b_O)
        torch.testing.assert_close(total, outputs[layer], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "phi3", "neox", "opt"])
def test_head_weights_give_the_values_of_each_query_head(tapped: Tapped, name: str) -> None:
    """z = A (x W_V + b_V) with x the normalised input that the module reads: checks the split and
    the GQA map."""
    model, plain = tapped(name)
    ids = tokens()
    read: dict[int, torch.Tensor] = {}

    def note(layer: int) -> Any:
        def pre(module: Any, args: Any, kwargs: Any) -> None:
            read[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return pre

    handles = [
        m.register_forward_pre_hook(note(i), with_kwargs=True)
        for i, m in enumerate(tiny.layers(plain))
    ]
    weights, _ = tiny.attentions(plain, input_ids=ids)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), model.capture_z() as z:
        model(input_ids=ids)
    for layer in range(2):
        w = model.head_weights(layer)
        value = torch.einsum("bkm,hmd->bhkd", read[layer].double(), w.W_V.double())
        value = value + (0 if w.b_V is None else w.b_V.double()[:, None])
        close(z[layer], (weights[layer] @ value).transpose(1, 2), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_residual_stream(tapped: Tapped, name: str) -> None:
    model, plain = tapped(name)
    ids = tokens()
    with torch.no_grad(), model.capture_resid() as resid:
        model(input_ids=ids)
    with torch.no_grad():
        hidden = plain(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(resid["post", 0], resid["pre", 1])
    for layer in range(2):
        torch.testing.assert_close(resid["pre", layer], hidden[layer], atol=1e-4, rtol=1e-3)
        if name == "neox":
            assert ("mid", layer) not in resid  # parallel attention: there is no stream in between
            continue
        assert not torch.equal(resid["mid", layer], resid["pre", layer])
        assert not torch.equal(resid["mid", layer], resid["post", layer])
    if name in ("llama", "gpt2", "qwen3", "mistral", "phi3", "opt"):  # the branch is added as it is
        with torch.no_grad(), model.capture_resid() as resid, model.capture_z() as z:
            model(input_ids=ids)
        w = model.head_weights(0)
        attention = w.result(z[0]).sum(2) + (0 if w.b_O is None else w.b_O)
        torch.testing.assert_close(
            resid["mid", 0], resid["pre", 0] + attention, atol=1e-4, rtol=1e-3
        )
    final = resid["final"]
    project = plain.get_output_embeddings()
    cap = getattr(plain.config, "final_logit_softcapping", None)
    with torch.no_grad():
        logits, wanted = project(final), plain(input_ids=ids).logits
    logits = cap * torch.tanh(logits / cap) if cap else logits
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "opt"])
@pytest.mark.parametrize("place", ["pre", "mid", "post"])
def test_residual_write_replaces_the_stream(tapped: Tapped, name: str, place: str) -> None:
    """Writing another run's stream at layer 1 (the last) gives that run's logits: both branches
    carry it."""
    model, _ = tapped(name)
    with torch.no_grad():
        with model.capture_resid() as source:
            wanted = model(input_ids=tokens(7)).logits

        def write(where: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
            return source[where, layer] if (where, layer) == (place, 1) else None

        with model.capture_resid(write) as resid:
            found = model(input_ids=tokens(8)).logits
        untouched = model(input_ids=tokens(8)).logits
    assert torch.equal(resid[place, 1], source[place, 1])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(untouched, wanted, atol=0.1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_residual_appends_over_forwards(tapped: Tapped, name: str) -> None:
    model, _ = tapped(name)
    with torch.no_grad(), model.capture_resid() as resid:
        model.generate(
            input_ids=tokens(), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
    for place in ("pre", "mid", "post"):
        assert resid[place, 1].shape == (2, LENGTH + 2, 32)


def uniform_z(
    plain: Any, values: dict[int, torch.Tensor], layer: int, mask: torch.Tensor
) -> torch.Tensor:
    """Mean of the visible values, (batch, queries, heads, d) float64."""
    sees = tiny.visible(mask, tiny.window_of(plain.config, layer)).double()
    return ((sees / sees.sum(-1, keepdim=True).clamp_min(1)) @ values[layer]).transpose(1, 2)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss", "qwen3"])
def test_gains_and_zeros_against_the_plain_definition(
    tapped: Tapped, name: str, layer: int
) -> None:
    model, plain = tapped(name)
    ids, mask = tokens(), left_padded(True)
    given, real = inputs_for(model, ids, mask), mask.bool()
    gains = torch.tensor([1.0, 2.5, 0.0, -1.0])[:, None]
    with torch.no_grad():
        with tiny.rewriting_z(plain, layer, lambda z: z * gains):
            wanted = plain(**given).logits
        with model.edit(ScaleHeads({f"{layer}.{h}": float(g) for h, g in enumerate(gains)})):
            found = model(**given).logits
        torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=1e-4)
        keep = torch.tensor([0.0, 1, 0, 1])[:, None]
        with tiny.rewriting_z(plain, layer, lambda z: z * keep):
            wanted = plain(**given).logits
        with model.edit(Ablate([(layer, 0), (layer, 2)])), model.capture_z() as z:
            found = model(**given).logits
    torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=1e-4)
    assert (
        float(z[layer][:, :, [0, 2]].abs().max())
        == 0
        < float(z[layer][real][:, [1, 3]].abs().min())
    )


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss", "qwen3"])
def test_uniform_attention_against_the_plain_definition(
    tapped: Tapped, name: str, layer: int
) -> None:
    model, plain = tapped(name)
    ids, mask = tokens(), left_padded(True)
    given, real = inputs_for(model, ids, mask), mask.bool()
    values: dict[int, torch.Tensor] = {}
    chosen = [1, 3]
    with torch.no_grad():
        with tiny.reading_values(plain, layer, values):
            untouched = plain(**given).logits
        flat = uniform_z(plain, values, layer, mask)

        def change(z: torch.Tensor) -> torch.Tensor:
            z = z.clone()
            z[:, :, chosen] = flat[:, :, chosen].to(z.dtype)
            return z

        with tiny.rewriting_z(plain, layer, change):
            wanted = plain(**given).logits
        edit = Ablate([(layer, h) for h in chosen], mode="uniform")
        with (
            model.edit(edit),
            model.observe("entropy", stage="after") as after,
            model.observe("entropy") as before,
        ):
            found = model(**given).logits
    torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(untouched[real], wanted[real], atol=1e-2)
    seen_keys = tiny.visible(mask, tiny.window_of(plain.config, layer)).sum(
        -1
    )  # (batch, 1, queries)
    wanted_entropy = seen_keys.clamp_min(1).double().log().expand(2, 2, -1)
    close(after[layer].entropy[:, chosen], wanted_entropy, rows(mask))
    close(after[layer].entropy[:, [0, 2]], before[layer].entropy[:, [0, 2]], rows(mask))
    weights, _ = tiny.attentions(plain, **given)
    a = weights[layer] * tiny.visible(mask, tiny.window_of(plain.config, layer))
    close(before[layer].entropy, torch.special.entr(a).sum(-1), rows(mask))


def reference_pool(plain: Any, tokenizer: Any, layer: int) -> torch.Tensor:
    """z (real tokens, heads, d) of the untouched model on IOI's corrupted prompts."""
    from interp import tasks

    pool: list[torch.Tensor] = []

    def note(z: torch.Tensor) -> torch.Tensor:
        pool.append(z[0])
        return z

    with torch.no_grad(), tiny.rewriting_z(plain, layer, note):
        for instance in tasks.get("ioi").sample(tokenizer, 32, 5):
            plain(input_ids=torch.tensor([instance.corrupted]))
    return torch.cat(pool)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_mean_and_resample_against_the_plain_definition(
    worded: Tapped, tokenizer: Any, name: str
) -> None:
    model, plain = worded(name)
    ids, mask = tokens(), left_padded(True)
    given, real = inputs_for(model, ids, mask), mask.bool()
    pool = reference_pool(plain, tokenizer, 1)
    mean = pool.double().mean(0)

    def change(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, :, 2] = mean[2].float()
        return z

    with torch.no_grad():
        with tiny.rewriting_z(plain, 1, change):
            wanted = plain(**given).logits
        # an outer edit must not reach the reference runs
        outer, inner = ScaleHeads({"0.0": 9.0, "0.3": -9.0}), Ablate("1.2", "mean", "ioi", seed=5)
        with model.edit(outer), model.edit(inner), model.capture_z() as z:
            model(**given)
        close(z[1][:, :, 2], mean[2].expand(2, LENGTH, -1), atol=1e-4)
        with model.edit(Ablate("1.2", "mean", "ioi", seed=5)):
            found = model(**given).logits
        torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=1e-4)
        drawn = []
        for seed in (5, 5, 6):
            with model.edit(Ablate("1.2", "resample", "ioi", seed=seed)), model.capture_z() as z:
                model(**given)
            drawn.append(z[1])
    for vector in drawn[0][:, :, 2].reshape(-1, 8):
        assert float((pool[:, 2] - vector).abs().amax(-1).min()) < 1e-4  # a vector of the pool
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert (
        len({tuple(v.tolist()) for v in drawn[0][:, :, 2].reshape(-1, 8)}) > LENGTH
    )  # varies over tokens and rows
    with torch.no_grad(), model.capture_z() as z:
        model(**given)
    torch.testing.assert_close(
        drawn[0][:, :, [0, 1, 3]], z[1][:, :, [0, 1, 3]], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("mode", ["uniform", "resample", "zero", "mean", "frozen", "random"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_prefill_and_decode_agree_under_ablation(worded: Tapped, name: str, mode: str) -> None:
    model, _ = worded(name)
    ids = tokens()
    edit = Ablate(
        ["0.1", "1.0", "1.3"], mode, "ioi" if mode in ("mean", "resample") else None, seed=3
    )
    with torch.no_grad(), model.edit(edit):
        whole = model(input_ids=ids).logits
        cache, parts = None, []
        for a, b in [(0, 8), *((i, i + 1) for i in range(8, LENGTH))]:
            out = model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True)
            cache, _ = out.past_key_values, parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_scope_prefill_and_decode(tapped: Tapped) -> None:
    """The two scopes together are the whole edit; each leaves the other's calls alone."""
    model, _ = tapped("llama")
    ids = tokens()

    def steps(*scopes: str) -> tuple[torch.Tensor, torch.Tensor]:
        with (
            torch.no_grad(),
            model.edit(*(ScaleHeads({"1.1": 0.0}, scope=s) for s in scopes)),
            model.capture_z() as z,
        ):
            out = model(input_ids=ids[:, :-1], use_cache=True)
            model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
        return z[1][:, :-1, 1], z[1][:, -1:, 1]

    prefill, decode = steps("prefill")
    assert float(prefill.abs().max()) == 0 < float(decode.abs().min())
    prefill, decode = steps("decode")
    assert float(decode.abs().max()) == 0 < float(prefill.abs().min())
    prefill, decode = steps("prefill", "decode")
    assert float(decode.abs().max()) == 0 == float(prefill.abs().max())


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_identity_edits_are_bit_equal(tapped: Tapped, name: str) -> None:
    model, _ = tapped(name)
    ids = tokens()
    with torch.no_grad():
        untouched = model(input_ids=ids).logits
        with model.edit(ScaleHeads({"0.0": 1.0, "1.3": 1.0}), Ablate([])):
            assert torch.equal(model(input_ids=ids).logits, untouched)
            assert model.module.config._attn_implementation != "interp_tap"


def test_edits_refuse_what_they_cannot_do(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    with pytest.raises(HeadError, match="L7H0"), model.edit(ScaleHeads({"7.0": 0.0})):
        pass
    with pytest.raises(HeadError, match="L0H4"), model.edit(Ablate("0.4")):
        pass
    with pytest.raises(EditError, match="reference"):
        Ablate("0.0", mode="mean")
    with pytest.raises(EditError, match="finite"):
        ScaleHeads({"0.0": float("inf")})
    with pytest.raises(EditError, match="scope"):
        ScaleHeads({"0.0": 0.5}, scope="sometimes")  # type: ignore[arg-type]
    assert model.observers_and_edits() == ([], [])


def test_observe_refuses_unknown_questions(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    for ask in (
        dict(names=["entropie"]),
        dict(names=["max"], reduce="sum"),
        dict(names=["max"], stage="during"),
    ):
        with pytest.raises(TapError), model.observe(*ask.pop("names"), **ask):  # type: ignore[arg-type]
            pass
    with pytest.raises(TapError, match="labels"), model.observe("group_mass"):
        pass
    with model.observe("max") as seen:
        pass
    with pytest.raises(TapError, match="not seen"):
        seen[0]


def test_gemma3_image_tokens_see_each_other() -> None:
    """Image tokens attend in both directions; the compact causal description must not be used
    there."""
    torch.manual_seed(0)
    text = hf.Gemma3TextConfig(
        vocab_size=101, **tiny.GQA, head_dim=8, sliding_window=WIDE, query_pre_attn_scalar=8
    )
    vision = hf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_id=99,
        boi_token_index=97,
        eoi_token_index=98,
    )
    module = hf.Gemma3ForConditionalGeneration(config).eval()
    tiny.stir(module)
    plain = tiny.eager(module)
    ids = torch.tensor([[3, 4, 5, 97, 99, 99, 99, 99, 98, 6, 7, 8]])
    kinds = (ids == 99).long()
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    given = dict(
        input_ids=ids,
        token_type_ids=kinds,
        pixel_values=pixels,
        attention_mask=torch.ones_like(ids),
    )
    model = hook(module, sample=given)
    assert model.towers == ["vision", ""] or set(model.towers) == {"vision", "text"}
    with torch.no_grad():
        wanted = plain(**given, output_attentions=True)
        with model.observe(
            "entropy", "argmax", "received", pairs={"next": later_image_token(ids)}
        ) as seen:
            found = model(**given)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    with torch.no_grad(), model.observe("max") as plainly:
        model(**given)
    assert (
        plainly[0].max.shape[-1] == ids.shape[1]
    )  # a bare number is a layer of the text, not of the image tower
    main = "" if "" in model.towers else "text"
    for layer, a in enumerate(w.double() for w in wanted.attentions):
        assert float(a[0, :, 4, 5:8].sum(-1).min()) > 0  # the first image token sees the later ones
        close(seen[main, layer].entropy, torch.special.entr(a).sum(-1))
        assert torch.equal(seen[main, layer].argmax, a.argmax(-1))
        close(
            seen[main, layer].pair_mass["next"][0, :, 4:7],
            torch.stack([a[0, :, q, q + 1] for q in (4, 5, 6)], -1),
        )


def later_image_token(ids: torch.Tensor) -> torch.Tensor:
    slots = torch.arange(ids.shape[1])[None, :, None]
    return torch.where((slots >= 4) & (slots < 7), slots + 1, -1)


def encoder_decoders() -> dict[str, Any]:
    bart = dict(
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4
    )
    bart |= dict(encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
    return {
        "bart": lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=101, d_model=32, init_std=0.2, bos_token_id=1, eos_token_id=2, **bart
            )
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=101,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
    }


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoder_and_cross_attention(name: str) -> None:
    torch.manual_seed(0)
    module = encoder_decoders()[name]().eval()
    tiny.stir(module)
    plain = tiny.eager(module)
    ids, mask = tokens(), padded("right")
    given = dict(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens(5, length=6))
    model = hook(module, sample=given)
    assert [(s.tower, s.kind, s.layer) for s in model.sites if s.tower] == [
        ("encoder", "self", i) for i in range(2)
    ]
    with torch.no_grad():
        wanted = plain(**given, output_attentions=True)
        with model.observe("max", "entropy") as seen:
            found = model(**given)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    real = mask.bool()[:, None].expand(2, 4, -1)
    for layer in range(2):
        encoder = wanted.encoder_attentions[layer]
        close(seen["encoder", layer].max[real], encoder.amax(-1)[real], atol=1e-4)
        for key, a in (
            (layer, wanted.decoder_attentions[layer]),
            (("cross", layer), wanted.cross_attentions[layer]),
        ):
            close(seen[key].max, a.amax(-1), atol=1e-4)
            close(seen[key].entropy, torch.special.entr(a).sum(-1), atol=1e-4)


def test_encoder_alone() -> None:
    torch.manual_seed(0)
    module = hf.BertForMaskedLM(hf.BertConfig(vocab_size=101, **tiny.BASE)).eval()
    plain, model = tiny.eager(module), hook(module)
    ids, mask = tokens(), padded("right")
    with torch.no_grad(), model.observe("entropy", "received") as seen:
        found = model(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    with torch.no_grad():
        wanted = plain(input_ids=ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(found[real], wanted.logits[real], atol=1e-4, rtol=1e-4)
    sees = (real[:, None, :, None] & real[:, None, None, :]).double()
    for layer, a in enumerate(wanted.attentions):
        close(seen[layer].entropy, torch.special.entr(a.double() * sees).sum(-1), rows(mask))
        close(seen[layer].received, (a * sees).sum(2) / sees.sum(2).clamp_min(1))


def test_a_model_that_no_tap_fits_is_refused_with_the_reason() -> None:
    config = hf.DiffLlamaConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with pytest.raises(TapError, match="differential attention"):
        hook(hf.DiffLlamaForCausalLM(config))


def test_something_else_is_refused() -> None:
    for thing in (torch.nn.Linear(2, 2), "a string", None):
        with pytest.raises(TapError, match="can't tap"):
            hook(thing)


def test_training_mode_with_dropout_is_refused() -> None:
    module = tiny.build("llama", attention_dropout=0.5)
    model = hook(module)
    module.train()
    with pytest.raises(TapError, match="eval"), model.observe("max"):
        model(input_ids=tokens())


def test_hooking_twice_gives_independent_views() -> None:
    """Two wrappers of one module: the inner block ends by itself, the outer one goes on and sees
    the forwards of both, as where blocks of one wrapper nest."""
    module = tiny.build("llama")
    one, two = hook(module), hook(module)
    with torch.no_grad(), one.observe("max") as first:
        one(input_ids=tokens())
        with two.observe("max") as second:
            two(input_ids=tokens())
        one(input_ids=tokens())
    assert first[0].max.shape[-1] == 3 * LENGTH
    assert second[0].max.shape[-1] == LENGTH
    assert module.config._attn_implementation == "sdpa"
