"""Sparse layouts against their definitions, key by key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from prompts import left_padded, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import interp
from interp.edits import HierarchicalTopk, Sharded, layout_edit
from interp.edits.layout_edit import LayoutEdit
from interp.errors import EditError
from interp_hooks import HookedModel
from interp_hooks.call import AttentionCall, Site
from interp_kernels import Mask, attention

Tapped = Callable[[str], tuple[HookedModel, Any]]


def sees(model: HookedModel, edit: Any, ids: torch.Tensor, mask: Any = None) -> dict[int, Any]:
    """Layer → (batch, heads, queries, keys): which keys have weight under the edit."""
    found = {}
    with (
        model.edit(edit),
        model.observe("topk", topk=ids.shape[1], stage="after") as seen,
    ):
        model.logits(ids, mask)
    for layer in range(model.n_layers):
        index = seen[layer].topk_index
        there = torch.zeros(*index.shape[:3], ids.shape[1] + 1, dtype=torch.bool)
        there.scatter_(3, index.clamp_min(-1) % (ids.shape[1] + 1), True)
        found[layer] = there[..., :-1].numpy()
    return found


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@torch.no_grad()
def test_sharded(tapped: Tapped, name: str, pads: int) -> None:
    model, _ = tapped(name)
    ids, mask = tokens(length=23), left_padded(True, 23) if pads else None
    edit = Sharded(stride=2, local=3, block=4)
    for there in sees(model, edit, ids, mask).values():
        group = model.n_heads // model.n_kv_heads
        for b in range(len(ids)):
            first = pads if mask is not None and not mask[b, 0] else 0
            for h in range(model.n_heads):
                for t in range(first, 23):
                    wanted = {
                        i
                        for i in range(first, t + 1)
                        if t - i < 3 or ((i - first) // 4) % 2 == (h // group) % 2
                    }
                    assert set(np.flatnonzero(there[b, h, t])) == wanted
        together = there.any(1)[0, -1]
        assert together[pads if mask is not None and not mask[0, 0] else 0 :].all()


@torch.no_grad()
def test_sharded_decodes_as_it_reads(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    ids = tokens(length=20)
    edit = Sharded(stride=2, local=3, block=2, heads=[(1, 0), (1, 1)])
    with model.edit(edit):
        wanted = model.logits(ids)
        out = model(input_ids=ids[:, :12], use_cache=True)
        found = [out.logits]
        for i in range(12, 20):
            out = model(
                input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True
            )
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=2e-5, rtol=1e-4)


def test_sharded_must_cover_the_context(pocket: Any) -> None:
    with pytest.raises(EditError, match="seen by none"), pocket.edit(Sharded(stride=5)):
        pass
    for wrong in (dict(stride=1), dict(local=0), dict(block=0), dict(stride=2.5)):
        with pytest.raises(EditError):
            Sharded(**wrong)


@torch.no_grad()
def test_a_search_that_keeps_all_is_attention(pocket: Any) -> None:
    ids = torch.arange(20, 60)[None]
    with pocket.edit(HierarchicalTopk(keep=64)):
        torch.testing.assert_close(pocket.logits(ids), pocket.logits(ids))
    with pocket.edit(HierarchicalTopk(keep=8, block_q=1, recent=1)):
        moved = (pocket.logits(ids) - tiny.eager(pocket.module)(input_ids=ids).logits).abs().max()
    assert moved > 1e-3


def test_their_json(tmp_path: Any) -> None:
    edits = [Sharded(stride=2, heads=["L1H0"]), HierarchicalTopk(keep=64, scope="prefill")]
    interp.edits.save(tmp_path / "e.json", edits)
    assert interp.edits.load(tmp_path / "e.json") == edits


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls too are answered by lists."""
    monkeypatch.setattr(layout_edit, "SHORT", 0)


EDITS = {
    "shards": lambda heads: Sharded(stride=2, local=5, block=3, heads=heads),
    "search": lambda heads: HierarchicalTopk(6, 4, 2, 2, 5, heads=heads),
}


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("heads", [None, [(0, 1), (1, 0), (1, 3)]])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss", "qwen3"])
@torch.no_grad()
def test_lists_of_keys_are_the_mask(
    tapped: Tapped, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, pads: bool, heads: Any
) -> None:
    """Where nobody asks for weights the keys are gathered; z is what the mask gives, and no mask
    of all queries and keys is made."""
    model, _ = tapped(name)
    length, prompt = 75, 70
    ids, real = tokens(length=length), left_padded(pads, length)
    edit = EDITS[kind](heads)

    def logits() -> list[torch.Tensor]:
        found = [model.logits(ids, real)]
        out = model(input_ids=ids[:, :prompt], attention_mask=real[:, :prompt], use_cache=True)
        for i in range(prompt, length):
            out = model(
                input_ids=ids[:, i : i + 1],
                attention_mask=real[:, : i + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            found.append(out.logits)
        return found

    with model.edit(edit), model.observe("max", stage="after"):
        wanted = logits()
    plain = model.logits(ids, real)
    calls = []

    def counted(self: Any, call: Any) -> Any:
        calls.append(call)
        return whole(self, call)

    whole = type(edit).seen
    monkeypatch.setattr(type(edit), "seen", counted)
    with model.edit(edit):
        found = logits()
    assert not calls
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=3e-5, rtol=1e-4)
    assert (found[0] - plain).abs().max() > 1e-3


def call_of(queries: int, keys: int, mask: Mask | None = None) -> AttentionCall:
    """A call of four query and two kv heads, of random tensors."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 8, generator=draw)
        for heads, n in ((4, queries), (2, keys), (2, keys))
    )
    site = Site("", 0, "self", "", 4, 2, 8)
    return AttentionCall(site, q, k, v, mask or Mask(q_start=keys - queries), 8**-0.5)


def by_mask(edit: Any, call: AttentionCall) -> torch.Tensor:
    call = edit.before(call)
    return attention(call.query, call.key, call.value, **call.settings).out


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize(
    "edit",
    [
        Sharded(stride=2, local=10**12),
        Sharded(stride=2, local=3, block=10**12),
        Sharded(stride=10**6, local=3, block=10**6),
        Sharded(stride=2, local=90, block=7),
        HierarchicalTopk(keep=10**12),
        HierarchicalTopk(keep=10**12, block_k=10**12),
        HierarchicalTopk(keep=6, recent=10**12),
        HierarchicalTopk(keep=6, recent=2, sink=10**12),
        HierarchicalTopk(keep=6, block_q=10**12, recent=2),
        HierarchicalTopk(keep=6, block_q=70, recent=2, sink=1),
        HierarchicalTopk(keep=9, block_q=90, block_k=2, recent=130, sink=3),
    ],
)
@pytest.mark.parametrize("queries", [1, 150])
@torch.no_grad()
def test_lists_are_no_longer_than_the_context(edit: Any, queries: int) -> None:
    """However large the sizes are: no more columns than there are keys, but for those of 64 queries
    that list together and those that are listed twice; and z is the mask's."""
    call = call_of(queries, 150)
    kv_heads = torch.arange(2)
    each = list(edit.listed(call, kv_heads))
    assert [r for part in each for r in range(part.start, part.stop)] == list(range(queries))
    for part in each:
        assert part.columns.shape[3] <= 3 * 150 + 64
        assert (part.stop - part.start) // part.columns.shape[2] <= 64
    found = edit.alone(call)
    torch.testing.assert_close(found, by_mask(edit, call), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("kind", EDITS)
@torch.no_grad()
def test_what_a_mask_shows_of_later_tokens_stays(kind: str) -> None:
    """An image or a prefix that sees itself whole: the layout hides none of its later tokens."""
    shown = torch.ones(24, 24, dtype=torch.bool).tril()
    shown[4:19, 4:19] = True
    call = call_of(24, 24, Mask(causal=False, dense=shown))
    edit = EDITS[kind](None)
    later = torch.ones(24, 24, dtype=torch.bool).triu(1)
    assert edit.seen(call)[..., later].all()
    hidden = edit.before(call).mask.dense
    assert (hidden & later).sum() == (shown & later).sum() * hidden.shape[0] * hidden.shape[1]
    assert edit.alone(call) is None


class Reductions(TorchDispatchMode):
    """The dtypes into which values are scattered and reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scatter_reduce" in func.name():
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_its_mask_can_be_made_on_a_gpu() -> None:
    """PyTorch reduces no bools there."""
    with Reductions() as seen:
        EDITS["search"](None).seen(call_of(24, 24))
    assert seen.dtypes == {torch.uint8}


@pytest.mark.usefixtures("lists")
@torch.no_grad()
def test_a_backend_that_is_named_is_used(pocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(20, 60)[None]
    edit = Sharded(stride=2, local=5, block=3)
    with pocket.edit(edit):
        wanted = pocket.logits(ids)
    monkeypatch.setattr(pocket, "backend", "reference")
    with monkeypatch.context() as patch, pocket.edit(edit):
        patch.setattr(Sharded, "alone", None)
        torch.testing.assert_close(pocket.logits(ids), wanted, atol=2e-5, rtol=1e-4)


@dataclass(frozen=True)
class Nothing(Sharded):
    """Another mask, the same lists."""

    name = "nothing_seen"

    def before(self, call: AttentionCall) -> AttentionCall:
        return super().before(replace(call, value=call.value * 0))


@dataclass(frozen=True)
class FirstKey(LayoutEdit):
    """A mask alone."""

    heads: tuple[Any, ...] | None = None
    scope: Any = "all"
    name = "first_key"

    def seen(self, call: AttentionCall) -> torch.Tensor:
        return torch.arange(call.n_keys).expand(1, 1, call.n_queries, -1) == 0


@pytest.mark.usefixtures("lists")
@torch.no_grad()
def test_layouts_of_ones_own() -> None:
    """One that changes the mask alone, or has no lists, is asked for the mask."""
    call = call_of(24, 24)
    assert Nothing(stride=2).alone(call) is None
    assert FirstKey().alone(call) is None
    first = call.value[:, :, :1].repeat_interleave(2, 1).expand(-1, -1, 24, -1)
    torch.testing.assert_close(by_mask(FirstKey(), call), first)


@pytest.mark.usefixtures("lists")
@torch.no_grad()
def test_their_way_is_told(pocket: Any) -> None:
    with pocket.edit(HierarchicalTopk(keep=8, recent=2)):
        assert "the keys that blocks of queries list" in str(pocket.explain())
        layout_edit.SHORT = 1024
        assert "the keys that blocks of queries list" not in str(pocket.explain())


@pytest.mark.usefixtures("lists")
def test_gradients_take_the_mask(pocket: Any) -> None:
    ids = torch.arange(20, 60)[None]
    edit = Sharded(stride=2, local=5, block=3)
    with torch.no_grad(), pocket.edit(edit):
        wanted = pocket.logits(ids)
    with pocket.edit(edit), torch.enable_grad():
        found = pocket.module(input_ids=ids).logits
        assert found.grad_fn is not None
    torch.testing.assert_close(found.detach(), wanted, atol=2e-5, rtol=1e-4)
