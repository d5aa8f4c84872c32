"""Caches that hold keys head by head: what the edit shows with all keys, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import tokens

import interp
from interp.caches import (
    Compression,
    HeadCache,
    HeavyHitterCache,
    ShardCache,
    SnapCache,
    compress,
    gate_for,
)
from interp.caches.choosing import full_heads
from interp.edits import Gate, Sharded, Streaming
from interp.errors import EditError, FloorError, InputError, TapError
from interp_hooks import HookedModel
from interp_hooks.call import AttentionCall
from interp_hooks.edit import Edit
from interp_hooks.huggingface.held_cache import HeldLayer

Tapped = Callable[[str], tuple[HookedModel, Any]]
NAMES = ["llama", "gpt2", "qwen3", "gemma2", "gemma3", "gpt_oss", "olmo2", "mistral"]
NEW = 9
PLAIN = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)


def some_gate(model: HookedModel, sink: int, recent: int, seed: int = 0) -> Gate:
    """About half of the kv heads stream, one in each layer and all of the first."""
    shape = (model.n_layers, model.n_kv_heads)
    alpha = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
    alpha[0], alpha[:, 0] = 0.0, 0.0
    return Gate(alpha, sink=sink, recent=recent)


def prompt(length: int, pads: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :pads] = 0
    return dict(input_ids=tokens(length=length), attention_mask=mask)


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_cache_is_the_edit(tapped: Tapped, name: str, pads: int) -> None:
    """Logits of a prompt in one piece, of single tokens and of a second piece, as with all keys."""
    model, _ = tapped(name)
    gate, rows = some_gate(model, 2, 4), prompt(24, pads)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    extra = {"attention_mask": mask} if pads else {}
    with model.edit(gate):
        wanted = model.logits(ids, **extra)
    cache, found = HeadCache(model, gate), []
    for start, stop in [(0, 10), (10, 11), (11, 12), (12, 13), (13, 20), (20, 24)]:
        seen = mask[:, :stop] if pads else None
        found.append(model.logits(ids[:, start:stop], seen, past_key_values=cache, use_cache=True))
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], wanted[real], atol=2e-5, rtol=1e-4)
    moved = (wanted[real] - model.logits(ids, **extra)[real]).abs().max()
    assert moved > 1e-3 or name in ("mistral", "gemma3")  # all layers have windows of their own


@torch.no_grad()
def test_streaming_everywhere_is_eager_attention_under_that_mask(tapped: Tapped) -> None:
    model, plain = tapped("llama")
    ids, n = tokens(length=30), 30
    q, k = torch.arange(n)[:, None], torch.arange(n)
    seen = (k <= q) & ((q - k < 5) | (k < 3))
    bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    wanted = plain(input_ids=ids, attention_mask=bias.expand(len(ids), -1, -1, -1)).logits
    cache = HeadCache(model, Gate(0.0, sink=3, recent=5))
    found = [
        model.logits(part, past_key_values=cache, use_cache=True)
        for part in ids.split([12, 1, 17], 1)
    ]
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=2e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_any_pieces_and_sizes(tapped: Tapped, data: st.DataObject) -> None:
    model, _ = tapped("llama")
    sink, recent = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 9))
    pads = data.draw(st.integers(0, 7))
    pieces = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))
    rows = prompt(sum(pieces), min(pads, pieces[0] - 1))
    ids, mask = rows["input_ids"], rows["attention_mask"]
    gate = some_gate(model, sink, recent, data.draw(st.integers(0, 9)))
    with model.edit(gate):
        wanted = model.logits(ids, mask)
    cache, at, found = HeadCache(model, gate), 0, []
    for size in pieces:
        step = ids[:, at : at + size]
        at += size
        found.append(model.logits(step, mask[:, :at], past_key_values=cache, use_cache=True))
        for layer in cache.layers:  # never more than its rule keeps
            for heads, store in getattr(layer, "stores", []):
                whole = type(store).__name__ == "Everything"
                most = at if whole else min(at, sink + recent - 1)
                assert store.key is not None and store.key.shape[1:3] == (len(heads), most)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], wanted[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("way", [{}, dict(num_beams=3), dict(num_return_sequences=2)])
@torch.no_grad()
def test_generate(tapped: Tapped, way: dict[str, int]) -> None:
    model, _ = tapped("llama")
    gate, rows = some_gate(model, 2, 4), prompt(14, 3)
    more = {**PLAIN, **way}
    if "num_return_sequences" in way:
        more |= dict(num_beams=2)
    with model.edit(gate):
        wanted = model.generate(**rows, **more)
    found = model.generate(**rows, **more, past_key_values=HeadCache(model, gate))
    assert torch.equal(found, wanted)
    with model.caching(lambda: HeadCache(model, gate)):
        assert torch.equal(model.generate(**rows, **more), wanted)
    assert not model.observers_and_edits()[1]


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("heads", [None, [(0, 0), (0, 1), (1, 2), (1, 3)]], ids=["all", "some"])
@torch.no_grad()
def test_shards_are_the_edit(tapped: Tapped, heads: Any, pads: int) -> None:
    model, _ = tapped("llama")
    edit, rows = Sharded(stride=2, local=4, block=3, heads=heads), prompt(31, pads)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    with model.edit(edit):
        wanted = model.logits(ids, mask)
    cache, found = ShardCache(model, edit), []
    for start, stop in [(0, 10), (10, 11), (11, 12), (12, 13), (13, 26), (26, 31)]:
        step = ids[:, start:stop]
        found.append(model.logits(step, mask[:, :stop], past_key_values=cache, use_cache=True))
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], wanted[real], atol=2e-5, rtol=1e-4)
    whole = 2 * model.n_layers * model.n_kv_heads * 2 * 31 * model.d_head * 4  # bytes, two samples
    assert cache.nbytes < (0.7 if heads is None else 0.85) * whole


def test_shards_are_of_whole_kv_heads(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    with pytest.raises(EditError, match="some of them only"):
        ShardCache(model, Sharded(stride=2, heads=[(0, 0)]))


@torch.no_grad()
def test_memory_falls_by_what_is_let_go(pocket: Any) -> None:
    n, sink, recent = 400, 4, 28
    ids = torch.randint(20, 500, (1, n), generator=torch.Generator().manual_seed(0))
    alpha = torch.zeros(pocket.n_layers, pocket.n_kv_heads)
    alpha[1, 2] = alpha[3, 0] = 1.0
    cache = HeadCache(pocket, Gate(alpha, sink=sink, recent=recent))
    pocket.logits(ids, past_key_values=cache, use_cache=True)
    number = 2 * pocket.d_head * 4  # bytes of a token's key and value in a kv head
    assert cache.nbytes == number * (2 * n + 14 * (sink + recent - 1))
    held = [
        x.untyped_storage().nbytes()
        for layer in cache.layers
        for _, store in layer.stores
        for x in (store.key, store.value)
    ]
    assert sum(held) == cache.nbytes  # no view keeps the rest alive


class KeptOnly(Edit):
    """Hides from later queries what a kv head did not keep of a prompt."""

    def __init__(self, kept: dict[int, torch.Tensor], prompt: int) -> None:
        self.kept, self.prompt = kept, prompt

    def touches(self, call: AttentionCall) -> bool:
        return call.is_decode

    def before(self, call: AttentionCall) -> AttentionCall:
        kept = self.kept[call.site.layer]  # (batch, kv_heads, held) slots
        seen = torch.zeros(*kept.shape[:2], call.n_keys, dtype=torch.bool)
        seen[..., : self.prompt].scatter_(2, kept, True)
        seen[..., self.prompt :] = True
        group = call.site.n_heads // call.site.n_kv_heads
        dense = seen.repeat_interleave(group, 1)[:, :, None]
        return replace(call, mask=replace(call.mask, dense=dense))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
@torch.no_grad()
def test_snap_keeps_what_the_last_rows_look_at(tapped: Tapped, name: str) -> None:
    """The kept slots from eager attentions, by the paper's words; then the text goes on as with all
    keys and the others hidden."""
    model, plain = tapped(name)
    n, size, window, pool = 24, 10, 4, 3
    ids = tokens(length=n)
    cache = SnapCache(model, size, window, pool)
    model.logits(ids, past_key_values=cache, use_cache=True)
    weights, _ = tiny.attentions(plain, input_ids=ids)
    kept: dict[int, torch.Tensor] = {}
    for layer, a in enumerate(weights):
        held = cache.layers[layer]
        if not isinstance(held, HeldLayer):
            continue  # a window of its own
        votes = a[:, :, n - window :].double().sum(2)
        votes = votes.view(len(ids), model.n_kv_heads, -1, n).sum(2)[..., : n - window].numpy()
        side = pool // 2
        padded = np.pad(votes, [(0, 0), (0, 0), (side, side)])
        mean = np.mean([padded[..., i : i + n - window] for i in range(pool)], 0)
        best = np.sort(np.argsort(-mean, -1)[..., : size - window], -1)
        last = np.broadcast_to(np.arange(n - window, n), (*best.shape[:2], window))
        kept[layer] = torch.from_numpy(np.concatenate([best, last], -1))
        store: Any = held.stores[0][1]
        assert torch.equal(store.slots, kept[layer])
        assert store.key.shape[2] == size
    step = tokens(length=n + 1)[:, n:]
    found = model.logits(step, past_key_values=cache, use_cache=True)
    whole = model(input_ids=ids, use_cache=True).past_key_values
    edit = KeptOnly(kept, n)
    edit.touches = lambda call: call.is_decode and call.site.layer in kept  # type: ignore[method-assign]
    with model.edit(edit):
        wanted = model.logits(step, past_key_values=whole, use_cache=True)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


class Heavy(Edit):
    """All keys in the cache, and of them shown to a kv head what H2O would hold: softmax by hand,
    the weights of each row added up, the lightest of the earlier ones hidden for good."""

    def __init__(self, size: int, recent: int) -> None:
        self.size, self.recent = size, recent
        self.mass: dict[int, np.ndarray] = {}
        self.gone: dict[int, np.ndarray] = {}

    def touches(self, call: AttentionCall) -> bool:
        return True

    def before(self, call: AttentionCall) -> AttentionCall:
        assert call.query is not None and call.key is not None
        layer, (batch, heads, n), new = call.site.layer, call.key.shape[:3], call.n_queries
        group = call.query.shape[1] // heads
        gone = self.gone.get(layer, np.zeros((batch, heads, 0), bool))
        gone = np.pad(gone, [(0, 0), (0, 0), (0, n - gone.shape[2])])
        q, k = call.query.double(), call.key.double().repeat_interleave(group, 1)
        logits = call.scaling * (q @ k.mT)  # (batch, query heads, new, n)
        at = torch.arange(n - new, n)[:, None]
        hidden = torch.from_numpy(gone).repeat_interleave(group, 1)[:, :, None]
        hidden = hidden | (torch.arange(n) > at)
        real = torch.ones(batch, n, dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        hidden = hidden | ~real[:, None, None]
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        rows = real[:, None, n - new :, None]
        by_kv = (weights * rows).nan_to_num().view(batch, heads, group, new, n).sum((2, 3)).numpy()
        mass = self.mass.get(layer, np.zeros((batch, heads, 0)))
        self.mass[layer] = mass = np.pad(mass, [(0, 0), (0, 0), (0, n - mass.shape[2])]) + by_kv
        for b, h in np.ndindex(batch, heads):
            here = np.flatnonzero(~gone[b, h])
            early = here[: len(here) - self.recent]
            spare = max(0, len(here) - self.size)
            gone[b, h, early[np.argsort(mass[b, h, early])[:spare]]] = True
        self.gone[layer] = gone
        mask = replace(call.mask, causal=False, dense=~hidden.expand(-1, logits.shape[1], -1, -1))
        return replace(call, mask=mask)


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@torch.no_grad()
def test_heavy_hitters_are_those_of_all_rows_so_far(tapped: Tapped, name: str, pads: int) -> None:
    """A prompt, single tokens and a second piece: logits and kept slots as with all keys in the
    cache and the others hidden."""
    model, _ = tapped(name)
    size, recent, rows = 9, 4, prompt(26, pads)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    edit, cache = Heavy(size, recent), HeavyHitterCache(model, size, recent)
    whole: Any = None
    for start, stop in [(0, 14), *((n, n + 1) for n in range(14, 22)), (22, 26)]:
        seen = mask[:, :stop] if pads else None
        piece = ids[:, start:stop]
        found = model.logits(piece, seen, past_key_values=cache, use_cache=True)
        with model.edit(edit):
            out = model(
                input_ids=piece,
                attention_mask=seen,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop],
                past_key_values=whole,
                use_cache=True,
            )
        whole = out.past_key_values
        real = mask[:, start:stop].bool()
        torch.testing.assert_close(found[real], out.logits[real], atol=3e-5, rtol=1e-4)
        for layer, gone in edit.gone.items():
            store: Any = cache.layers[layer].stores[0][1]
            assert store.key.shape[2] == size
            for b, h in np.ndindex(gone.shape[:2]):
                own = set(store.slots.expand(*gone.shape[:2], -1)[b, h].tolist())
                kept = set(np.flatnonzero(~gone[b, h]).tolist())
                pad = set(range(pads)) if b else set()
                assert own - pad == kept - pad


@torch.no_grad()
def test_heavy_hitters_under_beams(pocket: Any) -> None:
    """Beams reorder what is held; two equal beams are one."""
    ids = torch.arange(30, 60)[None]
    single = pocket.generate(input_ids=ids, past_key_values=HeavyHitterCache(pocket, 12), **PLAIN)
    beams = pocket.generate(
        input_ids=ids, past_key_values=HeavyHitterCache(pocket, 12), num_beams=3, **PLAIN
    )
    assert single.shape == beams.shape == (1, 39)
    cache = HeavyHitterCache(pocket, 12)
    pocket.logits(ids.repeat(2, 1), past_key_values=cache, use_cache=True)
    store: Any = cache.layers[0].stores[0][1]
    before = store.mass.clone()
    cache.layers[0].reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(store.mass[0], before[1]) and store.mass.shape == (2, 4, 12)


def test_tasks_in_a_block_are_answered_over_its_caches(pocket: Any) -> None:
    """Token by token: a window held is the window shown by the edit, and a cache that lets go of a
    prompt's needle loses it."""
    task = interp.tasks.get("niah").exactly(128)
    more: dict[str, Any] = dict(n=6, seed=1, format="bare", force=True)
    plain = interp.evaluate(pocket, task, **more)
    gate = Gate(0.0, sink=4, recent=20)
    shown = interp.evaluate(pocket, task, [gate], **more)
    with pocket.caching(lambda: HeadCache(pocket, gate)):
        held = interp.evaluate(pocket, task, **more)
    assert shown.edited is not None
    assert held.frame["baseline"].tolist() == shown.frame["edited"].tolist()
    np.testing.assert_allclose(
        held.frame["baseline_margin"], shown.frame["edited_margin"], atol=1e-3
    )
    assert any("caches of an open block" in note for note in held.notes)
    assert plain.baseline.mean == 1 and not plain.provenance["settings"]["steps"]
    for make in (
        lambda: SnapCache(pocket, 12, window=4),
        lambda: HeavyHitterCache(pocket, 12, recent=4),
    ):
        with pocket.caching(make):
            found = interp.evaluate(pocket, task, **more)
        assert found.baseline.mean < 0.5 and found.provenance["settings"]["steps"]
    assert not pocket.gives_caches


def test_workers_refuse_caches_of_a_block(pocket: Any) -> None:
    from interp.workers.judging import SharedJudge

    cache = HeavyHitterCache(pocket, 12)
    with pocket.caching(lambda: cache), pytest.raises(InputError, match="in one process"):
        SharedJudge(None)(pocket, None, [])  # type: ignore[arg-type]


def test_what_needs_all_keys_is_refused(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    gate = some_gate(model, 2, 4)

    def run() -> None:
        model.logits(tokens(length=8), past_key_values=HeadCache(model, gate), use_cache=True)

    with model.edit(Streaming(1, 2)), pytest.raises(TapError, match="the edit streaming"):
        run()
    with model.observe("entropy"), pytest.raises(TapError, match="statistics"):
        run()
    with model.capture_z() as z:  # what heads give is known
        run()
    assert z[0].shape[1] == 8
    with pytest.raises(TapError, match="interp has loaded"):
        model.module(input_ids=tokens(length=8), past_key_values=HeadCache(model, gate))
    with pytest.raises(TapError, match="taken back"):
        HeadCache(model, gate).layers[0].crop(-1)


def test_what_is_no_cache_is_told(pocket: Any, tmp_path: Path) -> None:
    with pytest.raises(EditError, match="lie between 0 and 1"):
        HeadCache(pocket, Gate(0.5))
    with pytest.raises(interp.errors.HeadError):
        HeadCache(pocket, Gate({"L9H0": 0.0}))
    with pytest.raises(InputError, match="none to choose"):
        SnapCache(pocket, 16, window=16)
    for recent in (0, 16):
        with pytest.raises(InputError, match="recent"):
            HeavyHitterCache(pocket, 16, recent)
    with pytest.raises(InputError, match="even"):
        SnapCache(pocket, 16, window=4, pool=2)


@given(
    n=st.integers(1, 400),
    budget=st.floats(0.01, 1.0),
    context=st.integers(64, 8192),
    sink=st.integers(0, 8),
    recent=st.integers(1, 64),
)
def test_a_budget_is_kept(n: int, budget: float, context: int, sink: int, recent: int) -> None:
    """As many heads as fit, and not one fewer."""
    share = (sink + recent) / context
    if share > budget or share >= 1:
        with pytest.raises(InputError):
            full_heads(n, budget, context, sink, recent)
        return
    full = full_heads(n, budget, context, sink, recent)

    def held(f: int) -> float:
        return (f + (n - f) * share) / n

    assert held(full) <= budget + 1e-6
    assert full == n or held(full + 1) > budget - 1e-6


def test_the_strongest_kv_heads_keep_everything(pocket: Any) -> None:
    atlas = interp.scan_heads(pocket, scores="induction", samples=2)
    gate = gate_for(atlas, 0.5, 1024, "induction", recent=60, n_kv_heads=pocket.n_kv_heads)
    table = np.asarray(atlas["induction"]).reshape(pocket.n_layers, pocket.n_kv_heads, -1).max(-1)
    best = {
        tuple(map(int, np.unravel_index(i, table.shape))) for i in np.argsort(-table.ravel())[:7]
    }
    assert {tuple(x) for x in (gate.alpha == 1).nonzero().tolist()} == best
    with pytest.raises(interp.errors.UnknownNameError):
        gate_for(atlas, 0.5, 1024, "retrieval")


def test_compress_measures_at_equal_memory_and_loads_again(pocket: Any, tmp_path: Path) -> None:
    found = compress(pocket, 0.5, context=256, score="retrieval", recent=28, n=4, samples=4)
    frame = found.frame.set_index("cache")
    assert frame.index.tolist() == [
        "whole",
        "by retrieval",
        "3 random draws",
        "streaming in all",
        "SnapKV",
    ]
    assert frame.memory["whole"] == 1 and (frame.memory.iloc[1:].between(0.42, 0.501)).all()
    # the row of the choice is what the edit says of the same problems
    task = interp.tasks.get("niah").exactly(256)
    under = interp.evaluate(pocket, task, [found.gate], n=4, seed=1, format="bare")
    assert under.edited is not None
    assert frame.needles["by retrieval"] == pytest.approx(under.edited.mean)
    folder = found.save(tmp_path / "half")
    again = Compression.load(folder)
    assert torch.equal(again.gate.alpha, found.gate.alpha)
    assert (again.gate.sink, again.gate.recent) == (4, 28)
    assert again.frame.equals(found.frame) or np.allclose(
        again.frame.drop(columns="cache").astype(float),
        found.frame.drop(columns="cache").astype(float),
        equal_nan=True,
    )
    (edit,) = interp.edits.load(folder / "gate.json")
    assert isinstance(edit, Gate) and torch.equal(edit.alpha, found.gate.alpha)
    assert "kv heads keep everything" in found._repr_html_()


def test_compress_stops_at_the_floor(worded: Tapped) -> None:
    model, _ = worded("llama")
    small: dict[str, Any] = dict(context=128, score="previous_token", recent=12, n=2, samples=2)
    with pytest.raises(FloorError, match="niah"):
        compress(model, 0.5, **small)
    found = compress(model, 0.5, force=True, **small)
    assert found.frame.needles[0] == 0 and "force" in " ".join(found.notes)
