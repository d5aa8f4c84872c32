"""A forward under the tap compiles into one graph where the untapped one does, with the same
answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interp
from interp_hooks import Question, compiled
from interp_hooks.errors import ActivationError, TapError
from interp_kernels import Mask, Received, Request, Rule, Steer, attention

NAMES = frozenset({"entropy", "max", "argmax", "distance"})
QUESTION = Question(
    NAMES, pairs={"first": torch.zeros(1, 1, 1, dtype=torch.long)}, received={"all": Received()}
)


class Graphs:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


def ids(batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 100, (batch, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "gemma2"])
def test_one_graph_with_the_same_answers(name: str, tapped: Any) -> None:
    model, _ = tapped(name)
    with torch.no_grad():
        untapped, plain = Graphs(), model.module(ids()).logits
        out = torch.compile(model.module, fullgraph=True, backend=untapped)(ids()).logits
        torch.testing.assert_close(out, plain)
        assert len(untapped.graphs) == 1
        torch._dynamo.reset()
        eager: list[Any] = []
        with model.watch(QUESTION, eager.append):
            model.module(ids())
        seen: list[Any] = []
        graphs = Graphs()
        with model.watch(QUESTION, seen.append):
            run = compiled(model, backend=graphs)
            first = run(ids()).logits
            again = run(ids()).logits
    assert len(graphs.graphs) == 1 and len(seen) == 2 * len(model.sites)
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)
    for stats, want in zip(seen, eager * 2, strict=True):
        assert stats.site == want.site
        for key, value in want.rows.items():
            torch.testing.assert_close(stats.rows[key], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(stats.pair_mass["first"], want.pair_mass["first"])
        torch.testing.assert_close(stats.received["all"], want.received["all"])


@pytest.mark.slow
def test_edits(tapped: Any) -> None:
    model, _ = tapped("llama")
    one = interp.edits.Temperature(1.5)
    with torch.no_grad(), model.edit(one):
        want = model.module(ids()).logits
        got = compiled(model, backend="eager")(ids()).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model.module(ids()).logits, want)


def test_it_is_of_its_blocks_alone(tapped: Any) -> None:
    model, _ = tapped("llama")
    with pytest.raises(TapError, match="No block is open"):
        compiled(model)
    with torch.no_grad(), model.watch(Question(frozenset({"max"})), lambda stats: None):
        run = compiled(model, backend="eager")
        with (
            model.watch(Question(frozenset({"max"})), lambda stats: None),
            pytest.raises(TapError, match="other blocks"),
        ):
            run(ids())
    with pytest.raises(TapError, match="other blocks"):
        run(ids())


def test_what_was_compiled_before_runs_eagerly_in_a_block(tapped: Any) -> None:
    """And leaves nothing out."""
    model, _ = tapped("llama")
    seen: list[Any] = []
    with torch.no_grad():
        before = torch.compile(model.module, backend="eager")
        plain = before(ids()).logits
        with model.watch(QUESTION, seen.append):
            torch.testing.assert_close(before(ids()).logits, plain, atol=1e-5, rtol=1e-4)
    assert len(seen) == len(model.sites)


def test_a_broken_layer_is_named_when_the_block_ends() -> None:
    import tiny

    from interp_hooks import hook

    module = tiny.build("llama")
    model = hook(module)
    with torch.no_grad():
        module.model.layers[1].self_attn.v_proj.weight[:] = float("nan")
    with (
        pytest.raises(ActivationError, match="layer 1"),
        torch.no_grad(),
        model.watch(Question(frozenset({"max"})), lambda stats: None),
    ):
        compiled(model, backend="eager")(ids())


def test_a_callback_may_do_anything(tapped: Any) -> None:
    """Look at numbers, say: it runs beside the graph, and of each forward anew."""
    model, _ = tapped("llama")
    sums: list[float] = []
    graphs = Graphs()
    with (
        torch.no_grad(),
        model.watch(Question(frozenset({"max"})), lambda s: sums.append(float(s.max.sum().item()))),
    ):
        run = compiled(model, backend=graphs)
        for _ in range(12):  # more than a function may be compiled anew
            run(ids())
    n = len(model.sites)
    assert len(graphs.graphs) == 1 and len(sums) == 12 * n and sums[:n] == sums[-n:]


def test_observe_records_what_a_compiled_forward_tells(tapped: Any) -> None:
    model, _ = tapped("llama")
    with torch.no_grad():
        with model.observe("entropy", "received") as want:
            model.module(ids())
        with model.observe("entropy", "received") as seen:
            compiled(model, backend="aot_eager")(ids())
    for layer in range(len(model.sites)):
        torch.testing.assert_close(seen[layer].entropy, want[layer].entropy, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen[layer].received, want[layer].received)


def test_what_a_graph_can_t_hand_over_is_refused(tapped: Any) -> None:
    model, _ = tapped("llama")
    with (
        torch.no_grad(),
        model.watch(Question(call=True), lambda stats: None),
        pytest.raises(TapError),
    ):
        compiled(model, backend="eager")(ids())


KEYS = torch.arange(32)[None] > 3
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "statistics": dict(request=Request(NAMES, topk=2)),
    "pairs": dict(request=Request(pairs={"first": torch.zeros(1, 1, 1, dtype=torch.long)})),
    "received": dict(request=Request(received={"all": Received()})),
    "padded": dict(mask=Mask(keys=KEYS), request=Request(NAMES)),
    "rule": dict(
        steer=Steer(
            spans=((0, 1, 1),), rule=Rule(torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
        )
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_compile(name: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 16)

    def run(q: Any, k: Any, v: Any) -> Any:
        result = attention(q, k, v, **CASES[name])
        return result.out, result.lse, list(result.stats.values())

    with torch.no_grad():
        got = torch.compile(run, fullgraph=True, backend="eager")(q, k, v)
        torch.testing.assert_close(got, run(q, k, v))
