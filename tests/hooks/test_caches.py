"""Every kind of cache under the tap: rows stand where the cache says, padding and windows hold."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

import pytest
import tiny
import torch
import transformers as hf
from prompts import LENGTH, inputs_for, left_padded, tokens

from interp.edits import ScaleHeads, ScaleTokens, ZeroTuning
from interp_hooks import HookedModel, hook
from interp_hooks.errors import TapError

Tapped = Callable[[str], tuple[HookedModel, Any]]
WINDOWED = ["gemma2", "gemma3", "gpt_oss", "mistral"]
NEW = 9
PLAIN = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
SHORT, LONG = 4, 11  # of a prompt; the window holds 6


def prompt(length: int, pads: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :pads] = 0
    return dict(input_ids=tokens(length=length), attention_mask=mask)


def check(model: HookedModel, plain: Any, given: Any, out: torch.Tensor, seen: Any) -> None:
    """Rows and totals are those of eager attention over the text that was written."""
    mask = torch.nn.functional.pad(given["attention_mask"], (0, NEW - 1), value=1)
    weights, _ = tiny.attentions(plain, **inputs_for(model, out[:, :-1], mask))
    for layer, a in enumerate(weights):
        sees = tiny.visible(mask, tiny.window_of(plain.config, layer))
        a = a * sees
        wanted = torch.special.entr(a).sum(-1)
        assert torch.equal(seen[layer].queries, mask.bool())
        torch.testing.assert_close(seen[layer].entropy.double(), wanted, atol=5e-4, rtol=1e-3)
        mean = a.sum(2) / sees.sum(2).clamp_min(1)
        found = seen[layer].received.double()
        torch.testing.assert_close(found[..., : mean.shape[-1]], mean, atol=5e-4, rtol=1e-3)
        assert not found[..., mean.shape[-1] :].any()


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("length", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("kind", ["static", "dynamic", "offloaded"])
@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_generate(tapped: Tapped, name: str, kind: str, length: int, pads: int) -> None:
    if kind == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading needs an accelerator")
    model, plain = tapped(name)
    given = prompt(length, pads)
    if model.module.config._attn_implementation == "eager":
        wanted = plain.generate(**given, **PLAIN)
    else:
        wanted = model.module.generate(**given, **PLAIN, cache_implementation=kind)
    with model.observe("entropy", "received") as seen:
        out = model.generate(**given, **PLAIN, cache_implementation=kind)
    assert torch.equal(out, wanted)
    check(model, plain, given, out, seen)


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_a_cache_by_hand(tapped: Tapped, name: str, pads: int) -> None:
    """`StaticCache` given to generate, and a prompt read in two forwards."""
    model, plain = tapped(name)
    given = prompt(LONG, pads)
    cache = hf.StaticCache(config=model.module.config, max_cache_len=LONG + NEW + 3)
    with model.observe("entropy", "received") as seen:
        out = model.generate(**given, **PLAIN, past_key_values=cache)
    check(model, plain, given, out, seen)
    with model.observe("entropy", "received") as seen:
        chunked = model.generate(
            **given,
            **PLAIN,
            past_key_values=hf.DynamicCache(config=model.module.config),
            prefill_chunk_size=4,
        )
    assert torch.equal(chunked, out)
    check(model, plain, given, out, seen)
    for kind in (hf.DynamicCache, hf.StaticCache):
        more = dict(max_cache_len=LONG + NEW + 3) if kind is hf.StaticCache else {}
        cache = kind(config=model.module.config, **more)
        mask = torch.nn.functional.pad(given["attention_mask"], (0, NEW - 1), value=1)
        whole = inputs_for(model, out[:, :-1], mask)
        with model.observe("entropy", "received") as seen:
            for start, stop in ((0, 5), (5, 9), (9, 15), (15, 16), (16, LONG + NEW - 1)):
                part = {k: v[:, start:stop] for k, v in whole.items()}
                part["attention_mask"] = mask[:, :stop]
                model(**part, past_key_values=cache, use_cache=True)
        assert [c.q_start for c in seen.calls] == [0, 5, 9, 15, 16]
        check(model, plain, given, out, seen)


@pytest.mark.skipif(find_spec("optimum") is None, reason="quanto is not installed")
@torch.no_grad()
def test_a_quantized_cache(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    given = prompt(LONG, 3)
    how = dict(PLAIN, cache_implementation="quantized", cache_config=dict(backend="quanto"))
    wanted = model.module.generate(**given, **how)
    with model.observe("entropy"):
        assert torch.equal(model.generate(**given, **how), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_edits_are_the_same_with_every_cache(tapped: Tapped, name: str) -> None:
    model, _ = tapped(name)
    given = prompt(LONG, 3)
    marks = torch.zeros(2, LONG, dtype=torch.bool)
    marks[:, 5:7] = True
    for edit in (ScaleHeads({"0.1": 0.0}), ZeroTuning(2.0), ScaleTokens(marks, 3.0)):
        with model.edit(edit):
            wanted = model.generate(**given, **PLAIN, use_cache=False)
            for kind in ("dynamic", "static"):
                found = model.generate(**given, **PLAIN, cache_implementation=kind)
                assert torch.equal(found, wanted), (edit, kind)


def minimax() -> Any:
    """Its cache keeps linear attention's state in layer 0 and so counts no tokens."""
    torch.manual_seed(0)
    config = hf.MiniMaxConfig(
        vocab_size=101,
        **tiny.GQA,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=2,
        block_size=8,
        layer_types=["linear_attention", "full_attention"],
    )
    return hf.MiniMaxForCausalLM(config).eval()


@torch.no_grad()
def test_a_cache_that_tells_no_length() -> None:
    module = minimax()
    plain, model, ids = tiny.eager(module), hook(module), tokens()

    def steps(run: Any) -> torch.Tensor:
        out = run(input_ids=ids[:, :6], use_cache=True)
        logits, cache = [out.logits], out.past_key_values
        for i in range(6, LENGTH):
            out = run(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            logits.append(out.logits)
        return torch.cat(logits, 1)

    with model.observe("entropy") as seen:
        found = steps(model)
    torch.testing.assert_close(found, steps(plain), atol=1e-5, rtol=1e-4)
    assert [c.q_start for c in seen.calls] == [0, *range(6, LENGTH)]
    # what the model does with padding then can't be told
    mask = left_padded(True)
    with model.observe("entropy"), pytest.raises(TapError, match="without padding"):
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        longer = torch.nn.functional.pad(mask, (0, 1), value=1)
        model(input_ids=ids[:, :1], attention_mask=longer, past_key_values=out.past_key_values)


@torch.no_grad()
def test_the_load_check_takes_decode_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tap that places a decode step's row wrongly is found on load."""
    from interp_hooks.huggingface import own_attention, tap

    own = tap.read

    def wrong(mask: Any, module: Any, n_queries: int, n_keys: int, kwargs: Any) -> Any:
        from dataclasses import replace

        found = own(mask, module, n_queries, n_keys, kwargs)
        return replace(found, q_start=0) if n_queries == 1 else found

    def refuse(*_: Any) -> Any:
        raise TapError("Nothing is recognised.")

    hook(tiny.build("llama"))
    monkeypatch.setattr(tap, "read", wrong)
    # the interface's tap is refused, and what the modules compute themselves is recognised instead
    assert cast(Any, hook(tiny.build("llama"))._adapter)._own
    monkeypatch.setattr(own_attention, "discover", refuse)
    with pytest.raises(TapError, match="decode step"):
        hook(tiny.build("llama"))
