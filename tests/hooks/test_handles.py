"""Several handles on one model, threads, and blocks that end as nobody planned."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from prompts import LENGTH, tokens

from interp.edits import ScaleHeads
from interp_hooks import HookedModel, hook
from interp_hooks.errors import TapError

ONE, OTHER = ScaleHeads({"0.1": 0.0}), ScaleHeads({"1.2": 0.0})


def wanted(module: Any, *scaled: tuple[int, int]) -> torch.Tensor:
    """Logits of an eager copy with the z of heads (layer, head) set to 0."""
    plain = tiny.eager(module)
    with ExitStack() as stack:
        for layer, head in scaled:
            keep = torch.ones(4, 1)
            keep[head] = 0
            stack.enter_context(tiny.rewriting_z(plain, layer, lambda z, keep=keep: z * keep))
        return plain(input_ids=tokens()).logits


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.allclose(found, expected, atol=1e-5, rtol=1e-4))


@torch.no_grad()
def test_edits_of_two_handles_compose() -> None:
    module = tiny.build("llama")
    plain, one, both = wanted(module), wanted(module, (0, 1)), wanted(module, (0, 1), (1, 2))
    a, b = hook(module), hook(module)
    with a.edit(ONE):
        assert near(module(input_ids=tokens()).logits, one)
        with b.observe("entropy") as seen:
            assert near(b(input_ids=tokens()).logits, one)
        with b.edit(OTHER):
            assert near(b(input_ids=tokens()).logits, both)
            assert near(a(input_ids=tokens()).logits, both)
        with b.clean():
            assert near(a(input_ids=tokens()).logits, plain)
        third = hook(module)  # loaded, and checked, inside the block
        assert near(third(input_ids=tokens()).logits, one)
    assert near(module(input_ids=tokens()).logits, plain)
    assert seen[1].entropy.shape[-1] == LENGTH
    own = hook(copy.deepcopy(module))
    with a.edit(ONE):  # a copy is another model
        assert near(own(input_ids=tokens()).logits, plain)
        made = copy.deepcopy(module)
        assert made.config._attn_implementation == "sdpa"
        assert near(made(input_ids=tokens()).logits, plain)
        short = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert made.generate.__self__ is made
        assert torch.equal(
            made.generate(tokens(), **short), tiny.eager(made).generate(tokens(), **short)
        )
        assert near(module(input_ids=tokens()).logits, one)


@torch.no_grad()
def test_handles_keep_their_own_backend() -> None:
    module = tiny.build("llama")
    a, b = hook(module, backend="reference"), hook(module, backend="streaming")
    with a.edit(ONE):
        assert a._tap.backend == "reference"
        with b.edit(OTHER):
            assert a._tap.backend == "streaming"
        assert (a.backend, b.backend, a._tap.backend) == ("reference", "streaming", "reference")


@torch.no_grad()
def test_a_part_and_the_whole() -> None:
    """A handle on the trunk shares the blocks of one on the whole model; where the two number
    layers otherwise, the second block is refused."""
    module = tiny.build("llama")
    one = wanted(module, (0, 1))
    whole, trunk = hook(module), hook(module.model, sample=dict(input_ids=tokens()))
    with trunk.edit(ONE):
        assert near(whole(input_ids=tokens()).logits, one)
        with whole.observe("max") as seen:
            whole(input_ids=tokens())
    assert len(seen) == 2
    bart = hf.BartConfig(
        vocab_size=101, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4
    )
    module = hf.BartForConditionalGeneration(bart).eval()
    whole = hook(module)
    encoder = hook(module.model.encoder, sample=dict(input_ids=tokens()))
    inner = encoder.observe("max")
    with whole.observe("max"), pytest.raises(TapError, match="another handle"), inner:
        pass
    with encoder.observe("max") as alone:
        encoder(input_ids=tokens())
    assert len(alone) == 2


def test_nothing_keeps_a_model_alive() -> None:
    module = tiny.build("llama")
    model = hook(module)
    with torch.no_grad(), model.edit(ONE), model.observe("max"):
        model(input_ids=tokens())
    gone = weakref.ref(module)
    del module, model
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_two_models_that_share_a_config() -> None:
    """The blocks of one leave the other as it is, whichever ends first."""
    first = tiny.build("llama")
    second = type(first)(first.config).eval()
    assert second.config is first.config
    plain, one = wanted(second), wanted(second, (0, 1))
    a, b = hook(first), hook(second)
    with a.edit(ONE):
        assert near(second(input_ids=tokens()).logits, plain)
    outer, inner = a.observe("max"), b.edit(ONE)
    outer.__enter__(), inner.__enter__()
    outer.__exit__(None, None, None)
    assert near(second(input_ids=tokens()).logits, one)
    inner.__exit__(None, None, None)
    assert first.config._attn_implementation == "sdpa"
    assert near(second(input_ids=tokens()).logits, plain)


@torch.no_grad()
def test_blocks_left_in_another_order() -> None:
    module = tiny.build("llama")
    plain, other = wanted(module), wanted(module, (1, 2))
    model = hook(module)
    first, second = model.edit(ONE), model.edit(OTHER)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert near(module(input_ids=tokens()).logits, other)
    second.__exit__(None, None, None)
    assert_untouched(model, plain)


@torch.no_grad()
def test_blocks_left_in_another_order_leave_compiling_on() -> None:
    """Compiled code stands aside while any block is open, and is back after the last one."""
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compiles() -> bool:
        torch._dynamo.reset()
        graphs.clear()
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
        return len(graphs) == 1

    assert compiles()
    a, b = hook(tiny.build("llama")), hook(tiny.build("llama"))
    first, second = a.edit(ONE), b.edit(OTHER)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert not compiles()
    second.__exit__(None, None, None)
    assert compiles()


def assert_untouched(model: HookedModel, plain: torch.Tensor) -> None:
    module = model.module
    assert near(module(input_ids=tokens()).logits, plain)
    assert model.observers_and_edits() == ([], [])
    assert module.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert "generate" not in vars(module) and "_expand_inputs_for_generation" not in vars(module)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@torch.no_grad()
def test_errors_in_a_block_leave_nothing(error: type[BaseException]) -> None:
    module = tiny.build("llama")
    plain, model = wanted(module), hook(module)

    def fail(stats: Any) -> None:
        raise error

    from interp_hooks import Question

    with pytest.raises(error), model.edit(ONE), model.watch(Question(), fail):
        model(input_ids=tokens())
    with pytest.raises(error), model.edit(ONE), model.clean():
        raise error
    assert_untouched(model, plain)
    # the same block goes on after a forward that failed in it, gated heads included
    with model.edit(ONE), pytest.raises(IndexError):
        module(input_ids=torch.tensor([[5000]]))
    one = wanted(module, (0, 1))
    with model.edit(ONE):
        with pytest.raises(IndexError):
            module(input_ids=torch.tensor([[5000]]))
        assert near(model(input_ids=tokens()).logits, one)


@torch.no_grad()
def test_a_generator_left_half_way_leaves_nothing() -> None:
    module = tiny.build("llama")
    plain, model = wanted(module), hook(module)

    def steps() -> Iterator[torch.Tensor]:
        with model.edit(ONE), model.observe("max"):
            for _ in range(3):
                yield model(input_ids=tokens()).logits

    walk = steps()
    next(walk)
    del walk
    gc.collect()
    assert_untouched(model, plain)
    block = model.edit(ONE)
    block.__enter__()
    del block
    gc.collect()
    assert_untouched(model, plain)


def in_thread(function: Callable[[], Any]) -> Any:
    """What a thread returns, or the error it ends with."""
    found: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@torch.no_grad()
def test_a_second_thread_is_refused_while_a_block_is_open() -> None:
    module = tiny.build("llama")
    plain, one, model = wanted(module), wanted(module, (0, 1)), hook(module)

    def edited() -> torch.Tensor:
        with model.edit(ONE):
            return model(input_ids=tokens()).logits

    assert near(in_thread(edited), one)  # a block may be any thread's
    other = wanted(module, (1, 2))
    with model.edit(OTHER), model.observe("max") as seen:
        for use in (
            edited,
            lambda: model(input_ids=tokens()),
            lambda: module(input_ids=tokens()),
            lambda: module.generate(tokens(), max_new_tokens=2),
            lambda: model.generate(input_ids=tokens(), max_new_tokens=2),
            lambda: model.clean().__enter__(),
            lambda: hook(module),
            lambda: model.explain(ONE),
        ):
            error = in_thread(use)
            assert isinstance(error, TapError), (use, error)
            assert "thread" in str(error)
        assert near(model(input_ids=tokens()).logits, other)
    assert seen[0].max.shape[-1] == LENGTH
    assert_untouched(model, plain)


def test_many_threads_that_take_turns_or_collide() -> None:
    """Each forward is right or refused, and nothing stays."""
    module = tiny.build("llama")
    with torch.no_grad():
        plain, one = wanted(module), wanted(module, (0, 1))
    model = hook(module)
    outcomes: list[str] = []

    def work(edit: bool) -> None:
        for _ in range(15):
            try:
                with torch.no_grad():
                    if edit:
                        with model.edit(ONE):
                            good = near(model(input_ids=tokens()).logits, one)
                    else:
                        good = near(model(input_ids=tokens()).logits, plain)
                outcomes.append("right" if good else "wrong")
            except TapError:
                outcomes.append("refused")

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 60 and "wrong" not in outcomes and "right" in outcomes
    with torch.no_grad():
        assert_untouched(model, plain)
