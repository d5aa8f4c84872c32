"""A forward under the tap doesn't make the host wait for a device in a layer. Run on meta tensors:
they have no numbers, so that whatever looks at one fails, and they are another device, so that
what is brought there is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

import interp
from interp_hooks import Question, forward_notes, hook
from interp_hooks.errors import ActivationError
from interp_hooks.forward_notes import fetched


class Crossings(TorchDispatchMode):
    """Counts what is brought to the device, and what comes from it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device: Counter[str] = Counter()
        self.from_device: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        after = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        name = func.__name__.partition(".")[0]
        if before == {"cpu"} and after == {"meta"}:
            self.to_device[name] += 1
        if "meta" in before and (after == {"cpu"} or name in ("_local_scalar_dense", "nonzero")):
            self.from_device[name] += 1
        return out


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many numbers are read from the device, a look each; all of them ones."""
    seen: list[int] = []

    def ones(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.numel())
        return torch.ones(x.shape)

    monkeypatch.setattr(forward_notes, "_copied", ones)
    # transformers' own look, one a forward: whether positions say that texts are packed
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *args: None)
    yield seen


def small(layers: int, tokenizer: Any) -> Any:
    model = tiny.build("llama", len(tokenizer), num_hidden_layers=layers)
    return hook(model, tokenizer=tokenizer)


PROBES = ("text", "repeat", "domains")


@pytest.mark.parametrize("probe", PROBES)
def test_a_scan_s_forward_looks_twice_and_uploads_once(
    probe: str, reads: list[int], tokenizer: Any
) -> None:
    """All that a scan asks of a text: one look at whether outputs are finite, one at the values;
    and no more uploads in a model of more layers."""
    counts = []
    for layers in (2, 5):
        model = small(layers, tokenizer)
        names = [
            s.name
            for s in interp.scores.select("all")
            if getattr(s, "probe", "") in PROBES and not s.needs_images and not s.needs_site
        ]
        plan = interp.plan_scan(model, names, context=48, samples=2)
        model.module.to("meta")  # checked and planned on the CPU; now it has no numbers
        scores = plan._by_probe[probe]
        assert scores
        batch = plan._batches[probe][0]
        reads.clear()
        with torch.no_grad(), Crossings() as crossings:
            records = plan._probe(probe, scores, batch, 0)
        assert len(reads) == 2 and reads[0] == layers
        assert not crossings.from_device
        assert {r.layer for r in records if r.layer >= 0} == set(range(layers))
        counts.append(sum(crossings.to_device.values()))
    assert counts[0] == counts[1] <= 16


def test_everything_one_may_ask(reads: list[int], tokenizer: Any) -> None:
    counts = []
    flags = torch.ones(1, 32, dtype=torch.bool)
    from interp_kernels import Received

    question = Question(
        frozenset({"entropy", "max", "argmax", "distance", "capped_distance", "group_mass",
                   "key_mass", "value_norm"}),
        pairs={"a": torch.arange(32)[None, :, None], "b": torch.zeros(1, 1, 1, dtype=torch.long)},
        received={"all": Received(), "some": Received(flags), "near": Received(flags, (0, 9))},
        labels=torch.arange(32)[None] % 3,
        n_groups=3,
        topk=4,
        z=True,
    )  # fmt: skip
    for layers in (2, 4):
        model = small(layers, tokenizer)
        model.module.to("meta")
        seen: list[Any] = []
        reads.clear()
        with torch.no_grad(), model.watch(question, seen.append), Crossings() as crossings:
            model.module(torch.zeros(1, 32, dtype=torch.long, device="meta"))
        assert len(seen) == layers and seen[0].entropy.device.type == "meta"
        assert reads == [layers]
        assert not crossings.from_device
        counts.append(sum(crossings.to_device.values()))
    assert counts[0] == counts[1] <= 8


def test_padding_is_hidden_without_looking_for_it() -> None:
    from interp_kernels import Mask, Request, attention

    q = torch.empty(2, 4, 16, 8, device="meta")
    k = torch.empty(2, 2, 16, 8, device="meta")
    keys = torch.empty(2, 16, dtype=torch.bool, device="meta")
    request = Request(frozenset({"entropy", "argmax"}), topk=2)
    attention(q, k, k, mask=Mask(keys=keys, queries=keys), request=request)


def broken(layer: int) -> Any:
    model = tiny.build("llama")
    handle = hook(model)
    with torch.no_grad():
        model.model.layers[layer].self_attn.v_proj.weight[:] = float("nan")
    return handle


@pytest.mark.parametrize("waiting", [True, False])
def test_a_broken_layer_is_named(waiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the layer on a CPU; at the end of the forward on a device, from one look."""
    monkeypatch.setattr(forward_notes, "waits", lambda device: waiting)
    model, seen = broken(1), []
    with (
        pytest.raises(ActivationError, match="layer 1 has NaN"),
        model.watch(Question(frozenset({"max"})), lambda stats: seen.append(stats.site.layer)),
    ):
        model.module(torch.arange(8)[None])
        pytest.fail("nobody looked")
    assert seen == (list(range(len(model.sites))) if waiting else [0])


def test_a_part_of_the_model_that_is_run_alone_is_looked_at_when_the_block_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward_notes, "waits", lambda device: True)
    model, after = broken(0), []
    with (
        pytest.raises(ActivationError, match="layer 0"),
        model.watch(Question(frozenset({"max"})), lambda stats: None),
    ):
        model.module.model(torch.arange(8)[None])
        after.append(True)
    assert after


def test_a_forward_that_failed_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_notes, "waits", lambda device: True)
    model = hook(tiny.build("llama"))
    fail = True

    def stop(stats: Any) -> None:
        if fail:
            raise RuntimeError("stopped")

    with model.watch(Question(frozenset({"max"})), stop):
        with pytest.raises(RuntimeError, match="stopped"):
            model.module(torch.arange(8)[None])
        fail = False
        model.module(torch.arange(8)[None])


def test_values_are_fetched_as_they_are() -> None:
    tensors = [torch.tensor([1.5, float("inf")]), torch.tensor([[2, 3]]), torch.tensor(True)]
    found = fetched(tensors)
    assert [t.shape for t in found] == [t.shape for t in tensors]
    for got, want in zip(found, tensors, strict=True):
        torch.testing.assert_close(got, want.float())
    assert fetched([]) == []


def test_a_question_is_asked_anew_where_the_call_is_another() -> None:
    """Rows are those of the call: a decode step after a prefill in one block."""
    model = hook(tiny.build("llama"))
    question = Question(pairs={"own": torch.arange(12)[None, :, None]})
    masses: list[torch.Tensor] = []
    with model.watch(question, lambda stats: masses.append(stats.pair_mass["own"])):
        out = model.module(torch.arange(8)[None], use_cache=True)
        model.module(torch.arange(8, 9)[None], past_key_values=out.past_key_values)
    n = len(model.sites)
    with model.watch(question, lambda stats: masses.append(stats.pair_mass["own"])):
        model.module(torch.arange(9)[None])
    torch.testing.assert_close(masses[n], masses[2 * n][:, :, 8:])
    torch.testing.assert_close(masses[0], masses[2 * n][:, :, :8])
