"""Path patching: against an implementation of its own on plain eager models, identities, and
planted circuits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_planted import planted

from interp.circuits.methods.path_patching import PathPatching, Paths, Receiver, repeated
from interp.circuits.methods.path_stages import stages
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, Written, from_task
from interp.errors import InputError
from interp.tasks.task import Instance
from interp_hooks import Head, HookedModel, hook
from interp_hooks.errors import HeadError

LENGTHS = (9, 6, 9)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Prompts:
    """Random pairs that differ in several tokens; the last position is judged."""
    rng = np.random.default_rng(seed)
    made = []
    for n in lengths:
        ids = rng.integers(3, 101, n)
        other = np.where(rng.random(n) < 0.5, rng.integers(3, 101, n), ids)
        right, *wrong = (int(t) for t in rng.choice(np.arange(3, 101), 3, replace=False))
        made.append(
            Instance(
                tuple(map(int, ids)), (n - 1,), ((right,),), (tuple(wrong),), tuple(map(int, other))
            )
        )
    return Prompts(Written(), tuple(made))


def bench_of(name: str, lengths: tuple[int, ...] = LENGTHS, **overrides: Any) -> PairedRuns:
    """A runs on a tiny float64 model."""
    model = hook(tiny.build(name, **overrides), name=name)
    model.module.double()
    return PairedRuns(model, prompts(lengths))


pytestmark = pytest.mark.usefixtures("one_thread")


# --- an implementation of its own
# -------------------------------------------------------------------------------


Change = Callable[[torch.Tensor], "torch.Tensor | None"]


class Plain:
    """An eager Llama-like model with plain hooks on its projections; knows nothing of the tap."""

    def __init__(self, model: Any, runs: PairedRuns):
        self.model, self.pairs = model, runs.batches()[0]
        self.blocks = model.model.layers

    @contextmanager
    def at(self, modules: dict[Any, Change], inputs: bool) -> Iterator[None]:
        """Pass what goes into (or comes out of) each module through a function; None leaves it."""

        def before(change: Change) -> Any:
            return lambda module, args: None if (new := change(args[0])) is None else (new,)

        def after(change: Change) -> Any:
            return lambda module, args, out: change(out)

        with ExitStack() as stack:
            for module, change in modules.items():
                register = (
                    module.register_forward_pre_hook if inputs else module.register_forward_hook
                )
                stack.callback(register(before(change) if inputs else after(change)).remove)
            yield

    @torch.no_grad()
    def margins(self, ids: torch.Tensor) -> torch.Tensor:
        mask = self.pairs.mask
        logits = self.model(ids, attention_mask=mask, position_ids=tiny.positions(mask)).logits[
            :, -1
        ]
        right = torch.stack(
            [row[i.accept[0][0]] for row, i in zip(logits, self.pairs.instances, strict=True)]
        )
        wrong = torch.stack(
            [
                row[list(i.wrong[0])].mean()
                for row, i in zip(logits, self.pairs.instances, strict=True)
            ]
        )
        return right - wrong

    def outputs(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """What goes into each o_proj: (batch, tokens, heads·d)."""
        seen: list[torch.Tensor] = []
        with self.at(
            {b.self_attn.o_proj: lambda z: seen.append(z.clone()) for b in self.blocks}, inputs=True
        ):
            self.margins(ids)
        return seen

    def patched(
        self, sender: Head, layer: int, wire: str, columns: slice, positions: str
    ) -> torch.Tensor:
        """(batch,) margins, q_proj's (k_proj's, v_proj's) `columns` of `layer` receiving."""
        clean, corrupted = self.outputs(self.pairs.clean), self.outputs(self.pairs.corrupted)
        d = self.blocks[0].self_attn.head_dim
        part = slice(sender.head * d, (sender.head + 1) * d)
        frozen = [z.clone() for z in clean]
        rows = slice(-1, None) if positions == "end" else slice(None)
        frozen[sender.layer][:, rows, part] = corrupted[sender.layer][:, rows, part]
        receiver = getattr(self.blocks[layer].self_attn, f"{wire}_proj")
        kept: list[torch.Tensor] = []
        fix: dict[Any, Change] = {
            b.self_attn.o_proj: lambda _, z=z: z for b, z in zip(self.blocks, frozen, strict=True)
        }
        with (
            self.at(fix, inputs=True),
            self.at({receiver: lambda out: kept.append(out.clone())}, inputs=False),
        ):
            self.margins(self.pairs.clean)

        def give(out: torch.Tensor) -> torch.Tensor:
            new = out.clone()
            new[..., columns] = kept[0][..., columns]
            return new

        with self.at({receiver: give}, inputs=False):
            return self.margins(self.pairs.clean)


@pytest.mark.parametrize("positions", ["end", "all"])
@pytest.mark.parametrize("wire", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_sender_to_receiver_as_plain_hooks_do_it(name: str, wire: str, positions: str) -> None:
    """Grouped keys, left padding, MLPs live; two layers of senders."""
    # float32: eager attention of padded float64 rows is not finite
    model = tiny.build(name, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    runs, d, target = PairedRuns(hook(model), prompts()), 8, Head(2, 3)
    plain = Plain(tiny.eager(model), runs)
    index = target.head if wire == "q" else target.head // 2  # 4 heads on 2 kv heads
    found = PathPatching((f"{target}.{wire}",), positions).find(runs)
    pairs = runs.batches()[0]
    clean, corrupted = plain.margins(pairs.clean), plain.margins(pairs.corrupted)
    gap = float((clean - corrupted).mean())
    for sender in (Head(0, 1), Head(1, 2)):
        wanted = plain.patched(
            sender, target.layer, wire, slice(index * d, (index + 1) * d), positions
        )
        effects = (clean - wanted) / abs(gap)
        assert found.effects is not None and found.effect is not None
        np.testing.assert_allclose(found.effects[runs.index[sender]], effects.numpy(), atol=3e-5)
        assert float(effects.abs().max()) > 1e-3  # there is something to compare
        published = -100 * float((wanted - clean).mean()) / float((corrupted - clean).mean())
        assert found.effect[runs.index[sender]] == pytest.approx(
            -published / 100 * np.sign(gap), abs=3e-5
        )
        assert found.score[runs.index[sender]] == abs(found.effect[runs.index[sender]])
    later = [runs.index[h] for h in runs.heads if h.layer >= 2]
    assert not found.effects[later].any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox"])
def test_all_heads_and_the_embedding_along_all_paths_are_the_corrupted_run(name: str) -> None:
    runs = bench_of(name)
    (pairs,) = runs.batches()
    paths = Paths(runs, pairs, "all")
    entered = runs.run(pairs, corrupted=True, keep=("pre",))[1]["pre", 0]

    def embed(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        return entered.repeat(2, 1, 1) if (place, layer) == ("pre", 0) else None

    with runs.model.capture_resid(embed):
        found = paths.send([runs.heads, runs.heads])
    torch.testing.assert_close(found, paths.corrupted.expand(2, -1), atol=1e-9, rtol=0)
    assert float((paths.clean - paths.corrupted).abs().max()) > 1e-2
    torch.testing.assert_close(paths.send([[]])[0], paths.clean, atol=1e-9, rtol=0)


@pytest.mark.parametrize("positions", ["end", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "neox"])
def test_with_frozen_mlps_the_stream_moves_by_the_sender_s_own_output(
    name: str, positions: str
) -> None:
    """Σ (z' − z) W_O, exactly: sequential blocks, and parallel ones."""
    runs = bench_of(name)
    (pairs,) = runs.batches()
    paths = Paths(runs, pairs, positions, freeze_mlps=True)
    clean, other = (runs.run(pairs, corrupted=c, keep=("z", "post"))[1] for c in (False, True))
    trunk = runs.model.module
    trunk = getattr(trunk, "model", None) or getattr(trunk, "transformer", None) or trunk.gpt_neox
    norm = next(
        getattr(trunk, n) for n in ("norm", "ln_f", "final_layer_norm") if hasattr(trunk, n)
    )
    sets = [[Head(0, 1)], [Head(1, 2)], [Head(0, 0), Head(1, 3)]]
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        paths.send(sets)
    finally:
        handle.remove()
    stream = seen[0].reshape(3, len(pairs.rows), *seen[0].shape[1:])
    where = torch.zeros_like(pairs.mask, dtype=torch.bool)
    where[:, -1 if positions == "end" else slice(None)] = True
    for heads, found in zip(sets, stream, strict=True):
        moved = clean["post", 1].clone()
        for head in heads:
            delta = (other["z", head.layer] - clean["z", head.layer])[:, :, head.head]
            moved += where[..., None] * (
                delta @ runs.model.head_weights(head.layer).W_O[head.head].double()
            )
        torch.testing.assert_close(found, moved, atol=1e-10, rtol=0)
        assert float((moved - clean["post", 1]).abs().max()) > 1e-3


def test_frozen_mlps_matter() -> None:
    runs = bench_of("llama")
    live, frozen = PathPatching().find(runs), PathPatching(freeze_mlps=True).find(runs)
    assert live.effects is not None and frozen.effects is not None
    last = [runs.index[h] for h in runs.heads if h.layer == 1]
    assert (
        np.abs(live.effects - frozen.effects)[last].max() > 1e-3
    )  # even the last layer has an MLP after it


def test_a_sender_not_before_the_receiver_has_no_effect() -> None:
    """Run all the same, it changes nothing; `find` does not run it."""
    runs = bench_of("llama", num_hidden_layers=3)
    (pairs,) = runs.batches()
    paths = Paths(runs, pairs, "all")
    receiver = [Receiver(Head(1, 0), "q")]
    found = paths.send([[Head(1, 2)], [Head(2, 1)], [Head(0, 2)]], receiver)
    torch.testing.assert_close(found[:2], paths.clean.expand(2, -1), atol=1e-9, rtol=0)
    assert float((found[2] - paths.clean).abs().max()) > 1e-6
    before = runs.forwards
    PathPatching(("L1H0.q",), "all").find(runs)
    assert (
        runs.forwards - before == 2 + 2 * 4
    )  # clean, corrupted, and two runs for each head of layer 0


def test_heads_on_one_kv_head_receive_together() -> None:
    runs = bench_of("llama")
    effects = [PathPatching((f"1.{h}.v",), "all").find(runs).effects for h in range(4)]
    assert all(e is not None for e in effects)
    np.testing.assert_array_equal(effects[0], effects[1])  # type: ignore[arg-type]
    np.testing.assert_array_equal(effects[2], effects[3])  # type: ignore[arg-type]
    assert np.abs(effects[0] - effects[2]).max() > 1e-4  # type: ignore[operator]


def test_stacked_senders_are_those_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = bench_of("llama", (9, 6, 9, 7, 8))
    together = PathPatching(("L1H0.q", "L1H3.v"), "all").find(runs)
    monkeypatch.setattr("interp.circuits.methods.path_patching.TOKENS", 1)
    monkeypatch.setattr("interp.circuits.runs.paired_runs.TOKENS", 18)  # two rows a batch
    assert len(runs.batches()) == 3
    one = PathPatching(("L1H0.q", "L1H3.v"), "all").find(runs)
    np.testing.assert_allclose(one.effects, together.effects, atol=1e-9)  # type: ignore[arg-type]
    assert repeated(runs.batches()[0], 3).rows == range(6)


def test_the_table_of_edges_and_intervals() -> None:
    runs = bench_of("llama", num_hidden_layers=3)
    found = PathPatching("L2H1.k, 1.0.q", "end", senders="0.1, 1.2").find(runs)  # type: ignore[arg-type]
    assert found.edges is not None and found.effects is not None and found.effect is not None
    rows = [tuple(r) for r in found.edges[["sender", "receiver", "kind"]].itertuples(index=False)]
    assert rows == [("L0H1", "L2H1", "k"), ("L0H1", "L1H0", "q"), ("L1H2", "L2H1", "k")]
    assert found.edges.score[0] == found.score[runs.index[Head(0, 1)]]
    tried = {runs.index[Head(0, 1)], runs.index[Head(1, 2)]}
    assert set(np.flatnonzero(found.score)) <= tried
    np.testing.assert_allclose(found.effects.mean(1), found.effect)
    assert any("together" in n for n in found.notes) and any(
        "last position" in n for n in found.notes
    )


@pytest.mark.parametrize(
    "receivers", [("output", "0.1.q"), (), ("0.1",), ("0.1.z",), ("output.q",)]
)
def test_receivers_that_make_no_sense(receivers: tuple[str, ...]) -> None:
    with pytest.raises((InputError, HeadError)) as error:
        PathPatching(receivers)
    assert str(error.value).endswith(".")


def test_what_is_refused() -> None:
    runs = bench_of("llama")
    with pytest.raises(InputError, match="positions"):
        PathPatching(positions="start")
    with pytest.raises(HeadError):
        PathPatching(("9.0.q",)).find(runs)
    with pytest.raises(HeadError):
        PathPatching(senders="0.7").find(runs)  # type: ignore[arg-type]
    same = tuple(
        Instance(i.ids, i.positions, i.accept, i.wrong, i.ids) for i in runs.prompts.instances
    )
    with pytest.raises(InputError, match="does not change the metric"):
        PathPatching().find(PairedRuns(runs.model, Prompts(Written(), same)))
    for wrong in (
        dict(share=2.0),
        dict(depth=0),
        dict(activations=()),
        dict(activations=("z",)),
        dict(at_least=0),
    ):
        with pytest.raises(InputError):
            stages(runs, **wrong)  # type: ignore[arg-type]


def test_transformer_lens_along_the_same_paths() -> None:
    """Before and after rotation, a query replaced at every position is the same query."""
    pytest.importorskip("transformer_lens")
    from prompts import hooked_transformer

    model = tiny.build("llama", seed=1)
    benches = [PairedRuns(m, prompts()) for m in (hook(model), hook(hooked_transformer(model)))]
    for settings in (
        dict(),
        dict(freeze_mlps=True),
        dict(receivers=("1.1.q", "1.2.k"), positions="all"),
    ):
        one, two = (PathPatching(**settings).find(b).effects for b in benches)  # type: ignore[arg-type]
        np.testing.assert_allclose(one, two, atol=1e-4)  # type: ignore[arg-type]
        assert np.abs(one).max() > 1e-3  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def induction(tokenizer: Any) -> PairedRuns:
    model: HookedModel = hook(planted(len(tokenizer)), name="planted", tokenizer=tokenizer)
    return PairedRuns(model, from_task(model, "induction", 4, 0))


def test_stages_walk_the_planted_circuit_backwards(induction: PairedRuns) -> None:
    """The induction head writes the answer; its keys, and nothing else of it, come from the
    previous-token head."""
    first, second = stages(induction, share=0.0, at_least=1, depth=5, activations=("k",))
    assert first.receivers == ("output",) and first.heads == (Head(1, 2),)
    assert second.receivers == ("L1H2.k",) and second.heads == (Head(0, 1),)
    assert first.to == "output" and second.to == "L1H2.k"
    assert second.senders == tuple(Head(0, h) for h in range(4))
    for wire in "qv":
        found = PathPatching((f"L1H2.{wire}",), "all").find(induction)
        assert found.score.max() < 1e-3 * second.found.score.max()
