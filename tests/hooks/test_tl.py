"""The same weights through HuggingFace, HookedTransformer and TransformerBridge give the same
numbers."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from prompts import hooked_transformer

import interp
from interp import scores
from interp.edits import Ablate, ScaleHeads, ScaleTokens, Span
from interp_hooks import HookedModel, hook
from interp_hooks.errors import ActivationError, HeadError, TapError
from interp_hooks.logits import logits_of

pytest.importorskip("transformer_lens")

MODELS = ["llama", "gpt2"]
LIBRARIES = ["hooked", "bridge"]
#: those of models without images, but for the slow one
SCORES = [s for s in scores.names() if s != "importance" and not scores.get(s).needs_images]
#: what a model of random weights without sink logits or gates has no value for, and a tokenizer
#: that cuts common words: qr asks that the needle is answered
UNDEFINED = {"qr"} | {s for s in SCORES if scores.get(s).needs_site or scores.get(s).needs_words}
#: counts of an arg-max that may fall differently where two weights are equal to rounding
TIES = {"retrieval", "retrieval_activation", "sink_rate"}
Trio = Callable[[str], dict[str, HookedModel]]


@pytest.fixture(scope="module")
def trio(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """name → {"hf", "hooked", "bridge"} of the same random weights."""
    from transformer_lens.model_bridge import TransformerBridge

    made: dict[str, dict[str, HookedModel]] = {}

    def get(name: str) -> dict[str, HookedModel]:
        if name not in made:
            model = tiny.build(name, len(tokenizer), seed=1)
            folder = str(tmp_path_factory.mktemp(name))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            reader = hf.AutoTokenizer.from_pretrained(folder)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bridge = TransformerBridge.boot_transformers(
                    folder, hf_model=copy.deepcopy(model), tokenizer=reader, device="cpu"
                )
                hooked = hooked_transformer(model)
            made[name] = {
                "hf": hook(model, tokenizer=tokenizer),
                "hooked": hook(hooked, tokenizer=tokenizer),
                "bridge": hook(bridge, tokenizer=tokenizer),
            }
        return made[name]

    return get


@pytest.fixture(scope="module")
def atlases(trio: Trio) -> Callable[[str, str], interp.Atlas]:
    made: dict[tuple[str, str], interp.Atlas] = {}

    def get(name: str, library: str) -> interp.Atlas:
        if (name, library) not in made:
            which = SCORES
            made[name, library] = interp.scan_heads(
                trio(name)[library], which, 96, 2, 0, progress=False
            )
        return made[name, library]

    return get


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_same_shape(trio: Trio, name: str, library: str) -> None:
    one, other = trio(name)["hf"], trio(name)[library]
    for what in ("n_layers", "n_heads", "n_kv_heads", "d_head", "heads", "towers", "max_context"):
        assert getattr(one, what) == getattr(other, what), what


@pytest.mark.slow
@pytest.mark.parametrize("score", [s for s in SCORES if s not in TIES])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_same_atlas(atlases: Any, name: str, library: str, score: str) -> None:
    one, other = (np.asarray(atlases(name, which)[score], float) for which in ("hf", library))
    assert np.isnan(one).all() if score in UNDEFINED else np.isfinite(one).all()
    np.testing.assert_allclose(other, one, atol=1e-4, rtol=1e-4)  # NaN where the other has NaN


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_same_counts_up_to_ties(atlases: Any, name: str, library: str) -> None:
    one, other = atlases(name, "hf"), atlases(name, library)
    assert (
        np.mean(np.asarray(one["sink_rate"], float) != np.asarray(other["sink_rate"], float))
        <= 0.125
    )
    assert other.frame["retrieval"].isna().all() == one.frame["retrieval"].isna().all()
    told = [[n for n in a.notes if "not measured" not in n] for a in (one, other)]
    assert told[0] == told[1]  # the others name the model, and what it said


def inputs(padded: str | bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 500, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, slice(-4, None) if padded == "right" else slice(4)] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(
    "padded", ["", "left", "right"], ids=["full", "left-padded", "right-padded"]
)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_statistics_z_and_logits_agree(trio: Trio, name: str, library: str, padded: str) -> None:
    found = {}
    given = inputs(padded)
    real = given["attention_mask"].bool()
    for which in ("hf", library):
        model = trio(name)[which]
        names = ("entropy", "max", "argmax", "distance", "received", "value_norm")
        with torch.no_grad(), model.observe(*names) as seen, model.capture_z() as z:
            out = interp.inputs.forward(model, **given)
        logits = logits_of(out)
        found[which] = logits, seen, z
    (logits, seen, z), (other, seen_other, z_other) = found.values()
    torch.testing.assert_close(other[real], logits[real], atol=2e-4, rtol=1e-3)
    for layer in range(2):
        torch.testing.assert_close(z_other[layer][real], z[layer][real], atol=1e-4, rtol=1e-3)
        keep = real[:, None].expand(2, 4, -1)
        for stat in ("entropy", "max", "distance"):
            a, b = getattr(seen[layer], stat), getattr(seen_other[layer], stat)
            torch.testing.assert_close(b[keep], a[keep], atol=1e-4, rtol=1e-3)
        assert torch.equal(seen_other[layer].argmax[keep], seen[layer].argmax[keep])
        torch.testing.assert_close(
            seen_other[layer].received, seen[layer].received, atol=1e-4, rtol=1e-3
        )
        kv = seen[layer].value_norm.shape[1]
        keep = real[:, None].expand(2, kv, -1)
        torch.testing.assert_close(
            seen_other[layer].value_norm[keep], seen[layer].value_norm[keep], atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("mode", ["scale", "zero", "mean", "resample", "uniform"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_edits_do_the_same(trio: Trio, name: str, library: str, mode: str) -> None:
    heads = ["0.1", "1.0", "1.3"]
    reference = "ioi" if mode in ("mean", "resample") else None
    edit = (
        ScaleHeads(dict.fromkeys(heads, -0.5))
        if mode == "scale"
        else Ablate(heads, mode, reference, seed=2)
    )
    ids = inputs(False)["input_ids"]
    with torch.no_grad():
        logits, entropy = [], []
        for which in ("hf", library):
            model = trio(name)[which]
            untouched = model.logits(ids)
            with model.edit(edit), model.observe("entropy", stage="after") as after:
                logits.append(model.logits(ids))
            entropy.append(after[1].entropy)
            assert torch.equal(model.logits(ids), untouched)
            assert not torch.allclose(logits[-1], untouched, atol=1e-2)
    torch.testing.assert_close(logits[1], logits[0], atol=3e-4, rtol=1e-3)
    torch.testing.assert_close(entropy[1], entropy[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_residual_stream_agrees(trio: Trio, name: str, library: str) -> None:
    ids = inputs(False)["input_ids"]
    found = []
    for which in ("hf", library):
        model = trio(name)[which]
        with torch.no_grad(), model.capture_resid() as resid:
            model(input_ids=ids)
        found.append(resid)
    for key in [*((p, layer) for p in ("pre", "mid", "post") for layer in range(2)), "final"]:
        torch.testing.assert_close(found[1][key], found[0][key], atol=2e-4, rtol=1e-3)
    model = trio(name)[library]
    source = found[0]["mid", 1] * 0.5

    def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        return source if (place, layer) == ("mid", 1) else None

    with torch.no_grad():
        logits = []
        for which in ("hf", library):
            with trio(name)[which].capture_resid(write):
                logits.append(trio(name)[which].logits(ids))
    torch.testing.assert_close(logits[1], logits[0], atol=3e-4, rtol=1e-3)
    assert not torch.allclose(model.logits(ids), logits[1], atol=1e-2)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_head_weights_agree(trio: Trio, name: str, library: str) -> None:
    for layer in range(2):
        one, other = (trio(name)[which].head_weights(layer) for which in ("hf", library))
        for what in ("W_Q", "W_K", "W_V", "W_O"):
            torch.testing.assert_close(
                getattr(other, what), getattr(one, what), atol=1e-5, rtol=1e-5
            )
        for what in ("b_Q", "b_K", "b_V", "b_O"):
            a, b = (
                torch.zeros(1) if t is None else t
                for t in (getattr(one, what), getattr(other, what))
            )
            assert (
                float((a - b).detach().abs().max()) < 1e-6
            )  # TransformerLens keeps zero biases where there are none


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_wires_agree(trio: Trio, name: str, library: str) -> None:
    """GPT-2 does not rotate queries and keys, so there these agree too."""
    places = ("v", "z", "pre", "mid", "post", "final", *(("q", "k") if name == "gpt2" else ()))
    ids, found = inputs(False)["input_ids"], []
    for which in ("hf", library):
        model = trio(name)[which]
        with model.activations(*places) as activations:
            metric = model.logits(ids)[:, -1, 7].sum()
        found.append((activations, torch.autograd.grad(metric, list(activations.values()))))
    (ours, slopes), (theirs, others) = found
    assert set(ours) == set(theirs)
    by_key = dict(zip(theirs, others, strict=True))
    for (key, wire), slope in zip(ours.items(), slopes, strict=True):
        torch.testing.assert_close(theirs[key], wire, atol=3e-4, rtol=1e-3)
        torch.testing.assert_close(by_key[key], slope, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["head_ablation", "attribution", "hisp", "eap", "path_patching"])
def test_circuits_agree(trio: Trio, name: str, library: str, method: str) -> None:
    ours, theirs = (
        interp.circuits.find(trio(name)[which], "ioi", method, n=4, force=True)
        for which in ("hf", library)
    )
    np.testing.assert_allclose(theirs.frame[method], ours.frame[method], rtol=2e-3, atol=2e-5)
    assert len(ours.edges) == len(theirs.edges)


@pytest.mark.parametrize("library", LIBRARIES)
def test_generate_is_observed_step_by_step(trio: Trio, library: str) -> None:
    ids = inputs(False)["input_ids"][:1]
    model, plain = trio("llama")[library], trio("llama")["hf"]
    given = dict(
        max_new_tokens=4, do_sample=False
    )  # TransformerLens may stop earlier, at its own end token
    with torch.no_grad(), model.observe("max", "argmax") as seen:
        out = model.generate(input_ids=ids, **given)
    wanted = plain.generate(input_ids=ids, min_new_tokens=4, **given)
    assert out.shape[1] > ids.shape[1] + 1
    assert torch.equal(out, wanted[:, : out.shape[1]])
    with torch.no_grad(), plain.observe("max", "argmax") as full:
        plain(input_ids=out[:, :-1])
    n = ids.shape[1]
    assert [(c.q_start, c.stop - c.start) for c in seen.calls] == [(0, n)] + [
        (n + i, 1) for i in range(out.shape[1] - n - 1)
    ]
    torch.testing.assert_close(seen[1].max, full[1].max, atol=1e-4, rtol=1e-3)
    assert torch.equal(seen[1].argmax, full[1].argmax)


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_rows_after_a_text_s_end_are_not_real(trio: Trio, library: str) -> None:
    ids = inputs(False)["input_ids"]
    model, n, new = trio("llama")[library], ids.shape[1], 6
    free = model.generate(input_ids=ids, max_new_tokens=new, do_sample=False, stop_at_eos=False)
    free = free[:, n:]
    token = int(free[0, 2])
    assert token not in free[0, :2].tolist() and token not in free[1].tolist()
    how = dict(max_new_tokens=new, do_sample=False, eos_token_id=token)
    for use in (model.generate, lambda input_ids, **more: model.module.generate(input_ids, **more)):
        with model.observe("max") as seen:
            use(input_ids=ids, **how)
        assert seen[0].queries[0].tolist() == [True] * (n + 2) + [False] * (new - 3)
        assert bool(seen[1].queries[1].all())


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_two_handles_and_two_threads(trio: Trio, library: str) -> None:
    one, two = trio("llama")[library], hook(trio("llama")[library].module)
    ids = inputs(False)["input_ids"]
    with one.edit(ScaleHeads({"0.1": 0.0, "1.2": 0.0})):
        wanted = one.logits(ids)
    with one.edit(ScaleHeads({"0.1": 0.0})), two.edit(ScaleHeads({"1.2": 0.0})):
        torch.testing.assert_close(two.logits(ids), wanted)
        torch.testing.assert_close(one.logits(ids), wanted)
        errors: list[Any] = []

        def run(use: Callable[[], Any]) -> None:
            try:
                use()
            except TapError as error:
                errors.append(error)

        for use in (lambda: one.logits(ids), lambda: one.module(ids)):
            thread = threading.Thread(target=run, args=(use,))
            thread.start()
            thread.join()
        assert len(errors) == 2 and all("thread" in str(error) for error in errors)


@pytest.mark.parametrize("library", LIBRARIES)
def test_hooks_are_gone_afterwards(trio: Trio, library: str) -> None:
    model = trio("gpt2")[library]
    ids = inputs(False)["input_ids"]
    with torch.no_grad():
        before = model.logits(ids)
        with (
            pytest.raises(RuntimeError, match="mine"),
            model.edit(Ablate("0.0")),
            model.capture_z(),
        ):
            model(input_ids=ids)
            raise RuntimeError("mine")
        assert torch.equal(model.logits(ids), before)
    points = model.module.hook_dict.values()
    assert not any(p._forward_hooks for p in points)
    with pytest.raises(HeadError, match="L9H0"), model.edit(Ablate("9.0")):
        pass


@pytest.mark.parametrize("library", LIBRARIES)
def test_explain_says_that_patterns_are_materialised(trio: Trio, library: str) -> None:
    assert "materialises" in trio("llama")[library].explain(Ablate("0.0"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_text_of_the_prompt_through_generation(trio: Trio, library: str) -> None:
    """Its tokens are seen by either library's own generation, as positions by hand."""
    model = trio("llama")[library]
    ids = model.tokenizer("the cat saw the dog .", return_tensors="pt")["input_ids"]
    told = []
    for keys in (Span("cat saw the"), Span(2, 5)):
        with model.edit(ScaleTokens(keys, gain=9.0)), model.observe("entropy") as seen:
            out = model.generate(
                input_ids=ids, max_new_tokens=4, do_sample=False, stop_at_eos=False
            )
        told.append((out, seen[1].entropy))
    assert torch.equal(told[0][0], told[1][0]) and torch.equal(told[0][1], told[1][1])


def test_a_bridged_huggingface_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    model = tiny.build("llama", len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reader = hf.AutoTokenizer.from_pretrained(tmp_path)
    TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=model, tokenizer=reader, device="cpu"
    )
    with pytest.raises(TapError, match="bridge"):
        hook(model)


def test_padded_generate_is_refused(trio: Trio) -> None:
    with pytest.raises(TapError, match="row by row"):
        trio("llama")["hooked"].generate(**inputs(True), max_new_tokens=2)


def test_broken_weights_are_named(tokenizer: Any) -> None:
    made = hooked_transformer(tiny.build("gpt2", len(tokenizer)))
    with torch.no_grad():
        made.blocks[1].attn.W_V[0, 0, 0] = float("nan")
    with pytest.raises(ActivationError):
        hook(made)
