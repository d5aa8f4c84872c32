"""A pre-allocated cache under edits: `generate(cache_implementation="static")` writes the tokens
that a growing cache writes, and no key's slot moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from prompts import tokens

from interp.edits import ACT, ScaleHeads, ScaleTokens, ZeroTuning
from interp_hooks import HookedModel, hook

#: plain; windows and soft-caps; sinks and windows; learned positions
NAMES = ["llama", "gemma2", "gpt_oss", "gpt2"]
EDITS: dict[str, Callable[[], Any]] = {
    "heads": lambda: ScaleHeads({"0.1": 0.0, "1.2": 3.0}),
    "first": lambda: ZeroTuning(4.0),
    "tokens": lambda: ScaleTokens([1, 3], 5.0),
    "act": lambda: ACT(beta=0.2),
}
PLAIN: dict[str, Any] = dict(
    do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0, disable_compile=True
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: a second thread only waits at barriers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> Callable[[str], HookedModel]:
    made: dict[str, HookedModel] = {}

    def get(name: str) -> HookedModel:
        if name not in made:
            made[name] = hook(tiny.build(name), name=name)
        return made[name]

    return get


@pytest.mark.parametrize("edit", sorted(EDITS))
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_tokens_are_those_of_a_growing_cache(models: Any, name: str, edit: str) -> None:
    model = models(name)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :3] = 0
    given = dict(input_ids=tokens(length=11), attention_mask=mask)
    with model.edit(EDITS[edit]()):
        grown = model.generate(**given, **PLAIN)
        kept = model.generate(**given, **PLAIN, cache_implementation="static")
    assert torch.equal(kept, grown)


@torch.no_grad()
def test_the_edits_say_something(models: Any) -> None:
    """Tokens would be equal of edits that do nothing."""
    given = dict(input_ids=tokens(length=11), attention_mask=torch.ones(2, 11, dtype=torch.long))
    plain = {name: models(name).generate(**given, **PLAIN) for name in NAMES}
    for edit in EDITS.values():
        changed = 0
        for name in NAMES:
            with models(name).edit(edit()):
                out = models(name).generate(**given, **PLAIN, cache_implementation="static")
            changed += not torch.equal(out, plain[name])
        assert changed


@torch.no_grad()
def test_nothing_is_copied_as_the_text_grows(models: Any) -> None:
    model = models("llama")
    cache = hf.StaticCache(config=model.module.config, max_cache_len=64)
    where = []
    with model.edit(ScaleHeads({"0.1": 0.0})), model.observe("entropy") as seen:
        for _ in range(4):
            model(input_ids=tokens(length=4)[:1], past_key_values=cache, use_cache=True)
            where.append(cache.layers[0].keys.data_ptr())
    assert len(set(where)) == 1
    assert [call.q_start for call in seen.calls] == [0, 4, 8, 12]
