"""What statistics of a few keys hold beside the model at 131,072 tokens: at most 1 % of its bytes,
counted from the shapes of Llama-3-8B; and the same numbers as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shapes import Ledger

from interp_hooks.call import AttentionCall, Site
from interp_hooks.engine import gate_values
from interp_hooks.question import Question
from interp_kernels import Mask, Received, Request, Steer, attention, budget
from interp_kernels.call import prepare
from interp_kernels.streaming import prepared_steer
from interp_kernels.streaming.listed_keys import pair_mass
from interp_kernels.streaming.prepared_steer import finish

HEADS, KV_HEADS, D, LONG = 32, 8, 128, 131_072
#: Its weights in bf16: 32 layers, d_model 4096, 128,256 tokens.
MODEL = 2 * (2 * 128_256 * 4096 + 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14_336))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv = (1, KV_HEADS, LONG, D)
    return meta(1, HEADS, LONG, D), meta(*kv), meta(*kv)


def peak(run: Any) -> int:
    """Bytes held at most beside what is given and what is returned."""
    with Ledger() as ledger:
        out = run()
    return ledger.peak - out.untyped_storage().nbytes()


@pytest.mark.parametrize("rows, m", [(1, 1), (1, 4), (1, 64), (LONG, 1), (LONG, 4)])
def test_pair_mass_upcasts_a_chunk_at_a_time(rows: int, m: int) -> None:
    call, index = prepare(*layer()), meta(1, rows, m, dtype=torch.int64)
    lse = meta(1, HEADS, LONG, dtype=torch.float32)
    assert peak(lambda: pair_mass(call, lse, index)) <= MODEL / 100


def test_blend_and_gain_upcast_a_chunk_at_a_time() -> None:
    call = prepare(*layer())
    steer = Steer(blend=meta(HEADS), gain=meta(1, HEADS, LONG))
    assert peak(lambda: finish(call.q, call.v, call.vis, steer)) <= MODEL / 100


def test_norms_of_values_and_gates_upcast_a_chunk_at_a_time() -> None:
    values = layer()[1]
    assert peak(lambda: budget.vector_norms(values)) <= MODEL / 100
    z = meta(1, LONG, HEADS, D)
    # all of it: what comes back is joined from parts
    assert peak(gate_values(z, z)) <= MODEL / 100


def test_a_question_about_a_long_text_is_put_to_a_layer_in_little_memory() -> None:
    q, k, v = layer()
    site = Site("", 0, "self", "", HEADS, KV_HEADS, D)
    call = AttentionCall(site, q, k, v, Mask(), D**-0.5)
    flags = meta(1, LONG, dtype=torch.bool)
    asked = Question(
        frozenset({"group_mass", "key_mass"}),
        pairs={str(m): meta(1, LONG, m, dtype=torch.int64) for m in (1, 2, 4)},
        received={"a": Received(flags), "b": Received(flags, (0, 10))},
        labels=meta(1, LONG, dtype=torch.int64),
        n_groups=3,
    )
    with Ledger() as ledger:
        request = asked.request(call)
    assert request.n_groups == 4
    assert ledger.peak <= MODEL / 100


@pytest.mark.parametrize("shared", [True, False])
def test_pair_mass_by_chunks_is_the_definition(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_CPU", 300)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 23, 8, dtype=torch.float64) for h in (4, 2, 2))
    index = torch.randint(-1, 23, (2, 1 if shared else 23, 3))
    request = Request(pairs={"some": index})
    ours = attention(q, k, v, request=request, backend="streaming").stats["pair_mass:some"]
    want = attention(q, k, v, request=request, backend="reference").stats["pair_mass:some"]
    torch.testing.assert_close(ours, want)


def test_blend_and_gain_by_chunks_are_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_CPU", 300)
    monkeypatch.setattr(prepared_steer, "_SMALL", 0)
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, 23, 8, dtype=torch.float64) for h in (4, 2, 2))
    for gain in (torch.rand(1, 4, 23), torch.rand(2, 1, 1)):
        steer = Steer(blend=torch.rand(4), gain=gain)
        ours = attention(q, k, v, steer=steer, backend="streaming").out
        torch.testing.assert_close(ours, attention(q, k, v, steer=steer, backend="reference").out)


def test_norms_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_CPU", 100)
    x = torch.randn(2, 3, 17, 8).bfloat16()
    torch.testing.assert_close(budget.vector_norms(x), x.double().norm(dim=-1).float())
    z = torch.randn(2, 17, 3, 8)
    torch.testing.assert_close(gate_values(z, 0.5 * z)(), torch.full((2, 3, 17), 0.5))
