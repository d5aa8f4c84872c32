"""Statistics after rules and blends, and the strongest keys of every row, by the row-major pass:
against loops over single weights and against the float64 definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from loose import loose
from test_fused import DEVICE, back, there, wide
from test_kernels import PLAIN_ROW, assert_same, loop_statistics, make_case
from test_steer import make_steer

from interp_kernels import Mask, Received, Request, Rule, Steer, attention, explain
from interp_kernels.fused import row_pass as row_pass_module
from interp_kernels.fused.edited import Edited
from interp_kernels.fused.row_pass import BLOCK, MAX_TOPK, row_pass
from interp_kernels.reference import weights

Tensor = torch.Tensor


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def qkv(lq: int, lk: int, d: int = 16, seed: int = 0) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, h, n, d, generator=gen) for h, n in ((4, lq), (2, lk), (2, lk)))


def test_a_row_of_edited_weights_by_hand() -> None:
    """ACT on two keys and a blend, worked out in numpy, one weight at a time."""
    q, k, v = qkv(9, 9)
    labels = torch.zeros(1, 1, 9, dtype=torch.long)
    labels[..., [0, 4]] = 1
    rule = Rule(torch.tensor([[1.0, 0.3]]), torch.tensor([[1.0, 0.0]]))
    steer = Steer(labels=labels, rule=rule, blend=torch.tensor([0.2]))
    a = weights(q.double(), k.double(), mask=Mask(), scale=0.25).numpy()
    for h, i in np.ndindex(4, 9):
        given = a[0, h, i, [j for j in (0, 4) if j <= i]].sum()
        rest = a[0, h, i].sum() - given
        for j in range(i + 1):
            if rest > 0:
                a[0, h, i, j] *= 0.3 if j in (0, 4) else 1 + 0.7 * given / rest
            a[0, h, i, j] = 0.8 * a[0, h, i, j] + 0.2 * (i == j)
    request = Request(
        PLAIN_ROW, torch.arange(9)[None] % 3, 3, {"p": torch.tensor([[[0, 4]]])},
        {"all": Received(), "most": Received(reduce="max")}, cap=3, topk=3,
    )  # fmt: skip
    settings = dict(scale=0.25, request=there(request), steer=there(steer))
    got = back(attention(*there((q, k, v)), backend="triton", **settings))
    seen = np.tril(np.ones((9, 9), dtype=bool))[None, None] & np.ones((1, 4, 1, 1), dtype=bool)
    want = loop_statistics(a, seen, Mask(), request)
    for name, value in want.items():
        if not name.startswith("received_count"):
            np.testing.assert_allclose(got.stats[name].numpy(), value, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(got.stats["topk_prob"].numpy(), -np.sort(-a)[..., :3], atol=1e-5)


@pytest.mark.slow
@examples(60)
@given(st.data())
def test_equals_reference(data: Any) -> None:
    """Any edit of one call, any statistics; in pieces of a few rows too."""
    tensors, kwargs = make_case(data.draw, torch.float32, 24)
    steer = make_steer(data.draw, *tensors[:2], softmax=True)
    narrow = {
        n: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in vars(steer).items()
    }
    kwargs["steer"] = replace(Steer(**narrow), rule=None if steer.rule is None else single(steer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_pass_module, "_CPU", data.draw(st.sampled_from([16, 200, 1 << 16])))
        got = back(attention(*there(tensors), backend="triton", **there(kwargs)))
    want = attention(*wide(tensors), backend="reference", **wide(kwargs))
    a = weights(*wide(tensors)[:2], **{n: x for n, x in wide(kwargs).items() if n != "request"})
    assert_same(got, want, a, 1e-4, kwargs.get("request"))


def single(steer: Steer) -> Rule:
    """The edit's rule in float32."""
    (rule,) = steer.rules
    names = ("keep", "receive", "tests", "bounds")
    given = {n: getattr(rule, n) for n in names}
    return replace(rule, **{n: x.float() for n, x in given.items() if x is not None})


@pytest.mark.parametrize("topk", [1, 5, pytest.param(MAX_TOPK, marks=pytest.mark.slow)])
def test_equal_weights_are_named_from_the_left(topk: int) -> None:
    """Of equal weights the lower columns, within a block and across blocks."""
    lk, rows = 5 * BLOCK + 3, 9
    q, k = torch.zeros(1, 2, rows, 16), torch.zeros(1, 1, lk, 16)
    settings = dict(mask=Mask(q_start=lk - rows), request=Request(topk=topk))
    got = back(attention(*there((q, k, k)), backend="triton", **settings))
    row = torch.arange(lk - rows, lk)[:, None]
    column = torch.arange(topk).expand(rows, -1)
    want = torch.where(column <= row, column, -1)
    assert torch.equal(got.stats["topk_index"][0, 0], want)
    prob = torch.where(column <= row, 1 / (row + 1), 0)
    torch.testing.assert_close(got.stats["topk_prob"][0, 1], prob, atol=1e-6, rtol=1e-6)


def test_the_strongest_keys_may_share_a_block() -> None:
    """All k in one block, or one in each of k blocks: both are found."""
    lk = 8 * BLOCK
    for columns in (list(range(3, 7)), [b * BLOCK + 1 for b in (0, 2, 5, 7)]):
        q, k, v = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, lk, 16), torch.zeros(1, 2, lk, 16)
        q = q.expand(-1, -1, 9, -1).clone()
        q[..., 0] = 1.0
        k[..., 0] = torch.randn(lk) * 0.01
        for i, c in enumerate(columns):
            k[:, :, c, 0] = 5.0 - i
        settings = dict(mask=Mask(causal=False), request=Request(topk=4), scale=1.0)
        got = back(attention(*there((q, k, v)), backend="triton", **settings))
        assert got.stats["topk_index"][0, :, :, :].eq(torch.tensor(columns)).all()


def test_weights_too_small_for_float32_keep_their_order() -> None:
    """Without an edit keys are ranked by their logits, which do not underflow."""
    q, k = torch.ones(1, 1, 12, 16), torch.zeros(1, 1, 12, 16)
    k[0, 0, :, 0] = torch.tensor([0.0, -300, -200, -400, -250] + [-1000.0] * 7)
    settings = dict(mask=Mask(causal=False), request=Request(topk=5), scale=1.0)
    got = back(attention(*there((q, k, k)), backend="triton", **settings))
    assert got.stats["topk_index"][0, 0, 0].tolist() == [0, 2, 4, 1, 3]


def test_what_is_broken_is_seen() -> None:
    """NaN in a query is NaN in its statistics, not a weight of 0."""
    q, k, v = qkv(12, 12)
    q[0, 1, 5] = float("nan")
    steer = Steer(spans=((0, 1, 1),), rule=Rule(torch.tensor([[1.0, 0.4]])))
    for edit in (None, steer):
        request = Request(frozenset({"entropy", "max"}), topk=2)
        got = attention(*there((q, k, v)), request=request, steer=there(edit), backend="triton")
        for name in ("entropy", "max", "topk_prob"):
            broken = back(got).stats[name].isnan()
            assert broken[0, 1, 5].all(), name
            assert broken.sum() == broken[0, 1, 5].sum(), name


def test_a_decode_step_names_no_hidden_key() -> None:
    """Of keys that a bias hides none is among the strongest, whatever else is asked."""
    q, k, v = qkv(2, 12)
    bias = torch.zeros(1, 1, 12)
    bias[..., 3:] = -torch.inf
    steer = Steer(bias=bias, spans=((0, 1, 1),), rule=Rule(torch.tensor([[1.0, 0.4]])))
    request = Request(frozenset({"argmax", "distance"}), topk=5)
    settings = dict(mask=Mask(q_start=10), request=request, steer=there(steer))
    got = back(attention(*there((q, k, v)), backend="triton", **settings)).stats
    assert got["topk_index"][..., :3].sort(-1).values.eq(torch.arange(3)).all()
    assert got["topk_index"][..., 3:].eq(-1).all()


def test_factors_of_any_sign() -> None:
    """Weights below 0: entropy −∞ as torch.special.entr says, sums as they are."""
    q, k, v = qkv(10, 10)
    steer = Steer(spans=((0, 3, 1),), rule=Rule(torch.tensor([[1.0, -0.5]])))
    request = Request(PLAIN_ROW, torch.arange(10)[None] % 2, 2, topk=2)
    settings = dict(request=request, steer=steer, scale=0.3)
    got = back(attention(*there((q, k, v)), backend="triton", **there(settings)))
    want = attention(*wide((q, k, v)), backend="reference", **wide(settings))
    assert got.stats["entropy"].eq(-torch.inf).all()
    for name in ("distance", "capped_distance", "group_mass"):
        torch.testing.assert_close(got.stats[name].double(), want.stats[name], atol=1e-4, rtol=1e-4)
    late = (got.stats["max"] - want.stats["max"]).abs()[:, :, 4:].max()
    assert late < 1e-5
    assert torch.equal(got.stats["topk_index"][:, :, 5:], want.stats["topk_index"][:, :, 5:])


def test_operators_have_shapes_without_values() -> None:
    q, k, _ = there(qkv(20, 20))
    lse = torch.zeros(1, 4, 20, device=DEVICE)
    none = (None,) * 10
    args = (q, k, lse, *none, 0.25, True, 0, None, 0, None, "entropy argmax", 0, 10, 3)
    torch.library.opcheck(
        torch.ops.interp.row_pass.default, args, test_utils=("test_schema", "test_faketensor")
    )


def test_no_square_matrix_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maxima of so many rows at a time as the budget says; the answer is the same."""
    q, k, v = qkv(30, 30)
    call = loose(*there((q, k, v)), scale=0.25, request=Request(topk=3))
    lse = attention(*there((q, k, v)), scale=0.25, backend="streaming").lse
    whole = row_pass(call, lse, Edited(), topk=3)
    held = []
    full = torch.Tensor.new_full

    def counted(self: Tensor, shape: Any, *rest: Any, **settings: Any) -> Tensor:
        held.append(int(np.prod(shape)))
        return full(self, shape, *rest, **settings)

    monkeypatch.setattr(row_pass_module, "_CPU", 99)
    monkeypatch.setattr(row_pass_module, "_DEVICE", 99)
    monkeypatch.setattr(torch.Tensor, "new_full", counted)
    parts = row_pass(call, lse, Edited(), topk=3)
    assert len(held) > 3
    assert max(held) <= 99
    assert torch.equal(parts["topk_index"], whole["topk_index"])


def test_a_vendor_call_keeps_its_way_under_statistics_of_edited_weights() -> None:
    """Row statistics after a rule do not force the rule's own forward passes."""
    q, k, v = there(qkv(40, 40))
    steer = Steer(spans=((0, 1, 1),), rule=Rule(torch.tensor([[1.0, 0.4]])))
    line = explain(
        q, k, v, steer=there(steer), request=Request(frozenset({"entropy"}), topk=2),
        backend="triton",
    )  # fmt: skip
    assert "come in the same pass" not in line
    assert "row-major pass of q and k: entropy, top-k by block maxima" in line
