"""Edits as JSON with their tensors beside it; what edits refuse, each in one sentence and before
anything changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prompts import inputs_for, left_padded, tokens
from test_edits_models import EVERYWHERE, JOINED, PROMPT

from interp import edits as E
from interp.errors import OutputError, UnknownNameError
from interp_hooks import HookedModel
from interp_hooks.edit import Edit
from interp_hooks.errors import EditError, HeadError, InterpError

Tapped = Callable[[str], tuple[HookedModel, Any]]
ALL: list[Any] = [
    e for group in (EVERYWHERE, PROMPT, JOINED) for edits in group.values() for e in edits
]
ALL += [
    E.VHR("0.1, 1.2", 3.0),
    E.Gate(torch.rand(2, 2, generator=torch.Generator().manual_seed(0)), 4, 8, "decode"),
    E.VAR((2, 9), {0: "initial", 3: [0, 1]}, {0: [4], 3: (2, 4)}),
    E.VAR(torch.ones(1, 4).bool(), [0, 2], preset="code"),
    E.VAR(),
    E.VAR(dims=[3, 5], tau=4.0),
    E.VHR(selected=torch.rand(3, 2, 4, generator=torch.Generator()) < 0.5),
    E.PAINT("image", 0.35),
    E.ZeroTuning(torch.tensor(0.5)),
    E.ACT.preset("code"),
    E.SigmoidAttention(-2.0),
    E.MoveMass([1, 4], (2, 4)),
    E.OverwriteRow(None, [2, 5], [[0.5, 1], [2, -0.5]], query=[6, 7]),
]


def one_sentence(error: pytest.ExceptionInfo[InterpError]) -> None:
    text = str(error.value)
    assert text and "\n" not in text and text.rstrip().endswith((".", "?")) and len(text) < 300, (
        text
    )


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_every_edit_goes_to_json_and_back(tmp_path: Path) -> None:
    assert {e.name for e in ALL} == set(E.registry.names())
    path = E.save(tmp_path / "edits.json", ALL)
    back = E.load(path)
    assert [type(e) for e in back] == [type(e) for e in ALL]
    for edit, read in zip(ALL, back, strict=True):
        assert plain(read.fields()) == plain(edit.fields()), edit.name
        assert {k: type(v) for k, v in vars(read).items() if k != "_last"} == {
            k: float if isinstance(v, torch.Tensor) and not v.ndim else type(v)
            for k, v in vars(edit).items() if k != "_last"
        }, edit.name  # fmt: skip
    assert E.to_json(back, tmp_path) == json.loads(path.read_text())


def test_spans_and_positions_stay_what_they_are() -> None:
    span, two = E.ScaleTokens((2, 5), 3.0), E.ScaleTokens([2, 5], 3.0)
    assert span.to_json()["keys"] == "2:5" and two.to_json()["keys"] == [2, 5]
    assert E.from_json([span.to_json(), two.to_json()]) == [span, two]


def test_an_edit_acts_the_same_after_a_file(tapped: Tapped, tmp_path: Path) -> None:
    model, _ = tapped("llama")
    ids, mask = tokens(), left_padded(True)
    edits = [
        E.Gate(torch.tensor([[0.2, 0.7], [1.0, 0.0]]), 1, 2),
        *EVERYWHERE["scale_tokens"],
        *EVERYWHERE["var"],
    ]
    found = []
    for made in (edits, E.load(E.save(tmp_path / "e.json", edits))):
        with torch.no_grad(), model.edit(*made):
            found.append(model(**inputs_for(model, ids, mask)).logits)
    assert torch.equal(*found)


def test_tensors_beside_the_json(tmp_path: Path) -> None:
    edit = E.Gate(torch.tensor([[0.25, 1.0]], requires_grad=True))
    with pytest.raises(EditError) as error:
        E.to_json([edit])
    one_sentence(error)
    path = E.save(tmp_path / "a" / "gate.json", [edit, edit])
    (file,) = path.parent.glob("*.safetensors")  # the same tensor once
    assert json.loads(path.read_text())[0]["alpha"] == {"tensor": file.name}
    with pytest.raises(EditError) as error:
        E.from_json(json.loads(path.read_text()))
    one_sentence(error)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(EditError, match="saved with") as error:
        E.load(path)
    one_sentence(error)
    file.unlink()
    with pytest.raises(OutputError) as missing:
        E.load(path)
    one_sentence(missing)
    path.write_text(json.dumps(dict(edit="gate", alpha=dict(tensor="../../etc/passwd"))))
    with pytest.raises(EditError) as error:
        E.load(path)
    one_sentence(error)


BAD: dict[str, Callable[[], Any]] = {
    "γ = 0": lambda: E.ZeroTuning(0.0),
    "γ < 0 of one head": lambda: E.ZeroTuning({"0.1": 2.0, "0.2": -1.0}),
    "γ not finite": lambda: E.ZeroTuning(float("inf")),
    "γ of shape (2,)": lambda: E.ZeroTuning(torch.ones(2)),
    "γ and heads": lambda: E.ZeroTuning({"0.1": 2.0}, heads="0.2"),
    "β > 1": lambda: E.ACT(1.2),
    "β < 0": lambda: E.ACT(-0.1),
    "α = 0": lambda: E.ACT(alpha=0),
    "act while decoding": lambda: E.ACT(scope="decode"),
    "no such preset": lambda: E.ACT.preset("book"),
    "gain < 0": lambda: E.ScaleTokens("initial", -1),
    "no such keys": lambda: E.ScaleTokens("last", 2),
    "negative position": lambda: E.ScaleTokens([-1], 2),
    "backward span": lambda: E.ScaleTokens((5, 2), 2),
    "flat tensor": lambda: E.ScaleTokens(torch.ones(4), 2),
    "backward queries": lambda: E.ScaleHeads({"0.0": 2}, queries=(4, 2)),
    "queries of one number": lambda: E.Ablate("0.0", queries=(4,)),  # type: ignore[arg-type]
    "share > 1": lambda: E.MoveMass("initial", [2], 1.5),
    "gives and receives": lambda: E.MoveMass("initial", (0, 3)),
    "scope": lambda: E.SoftPAG(0.5, scope="sometimes"),  # type: ignore[arg-type]
    "u > 1": lambda: E.SoftPAG(1.5),
    "τ = 0": lambda: E.Temperature(0.0),
    "no such rule": lambda: E.Temperature(rule="linear"),
    "no image": lambda: E.VAR(None, text_sinks="initial"),
    "no sinks": lambda: E.VAR((1, 4), dims=None),
    "sinks and dims": lambda: E.VAR((1, 4), "initial", dims=[3]),
    "negative dims": lambda: E.VAR(dims=[-1]),
    "no dims": lambda: E.VAR(dims=[]),
    "dims in words": lambda: E.VAR(dims="all"),
    "τ of var = 0": lambda: E.VAR(tau=0),
    "ρ > 1": lambda: E.VAR((1, 4), "initial", rho=2.0),
    "visual sink outside": lambda: E.VAR((1, 4), "initial", [7]),
    "var's preset": lambda: E.VAR((1, 4), "initial", preset="book"),
    "nothing to reinforce": lambda: E.VHR(),
    "heads and selected": lambda: E.VHR("0.1", selected=torch.ones(1, 2, 4).bool()),
    "selected of two dimensions": lambda: E.VHR(selected=torch.ones(2, 4).bool()),
    "divergence alone": lambda: E.VHR(divergence=torch.ones(2, 4)),
    "divergence's shape": lambda: E.VHR.select(torch.ones(2, 4), torch.ones(2, 3)),
    "divergence's layers": lambda: E.VHR.select(torch.ones(2, 4), torch.ones(2, 4), [1]),
    "recent = 0": lambda: E.Streaming(recent=0),
    "α > 1": lambda: E.Gate(1.5),
    "α of shape (4,)": lambda: E.Gate(torch.ones(4)),
    "bias and length": lambda: E.SigmoidAttention(1.0, 5),
    "length 0": lambda: E.SigmoidAttention(length=0),
    "power 0": lambda: E.SoftplusReweight(0),
    "keep 130 %": lambda: E.HeadGate(1.3),
    "shared 2": lambda: E.HeadGate(2, 2.0),
    "routers of one layer": lambda: E.RoutedHeads(torch.zeros(6, 32)),
    "a router that is not finite": lambda: E.RoutedHeads(torch.full((2, 6, 32), torch.nan)),
    "routed 0": lambda: E.RoutedHeads(torch.zeros(2, 6, 32), keep=0),
    "none routed": lambda: E.RoutedHeads(torch.zeros(2, 6, 32), shared=0.9),
    "min_rows in words": lambda: E.ACT(min_rows="x"),  # type: ignore[arg-type]
    "min_rows < 1": lambda: E.ACT(min_rows=0),
    "a head twice": lambda: E.ScaleHeads({"L1H1": 0.0, "1.1": 2.0}),
    "a head's γ twice": lambda: E.ZeroTuning({"L1H1": 0.5, "1.1": 2.0}),
    "unknown field": lambda: E.from_json({"edit": "zero_tuning", "gama": 2}),
    "head of another kind": lambda: E.from_json({"edit": "act", "heads": [3]}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_settings(what: str) -> None:
    with pytest.raises(EditError if what != "head of another kind" else InterpError) as error:
        BAD[what]()
    one_sentence(error)


def test_unknown_edit() -> None:
    with pytest.raises(UnknownNameError, match="zero_tuning"):
        E.from_json({"edit": "zerotuning"})


#: another model's geometry, and what this one cannot take; noticed on entry of the block
REFUSED: list[tuple[Edit, type[InterpError]]] = [
    (E.ZeroTuning(2.0, "5.0"), HeadError),
    (E.ZeroTuning({"0.9": 2.0}), HeadError),
    (E.ScaleTokens("initial", 2.0, "0.4"), HeadError),
    (E.ACT(heads="vision.0.1"), HeadError),
    (E.VHR("2.0"), HeadError),
    (E.Gate({"0.2": 0.5}), HeadError),  # a query head, but there are two KV heads
    (E.Gate(torch.rand(4, 2)), EditError),
    (E.HeadGate(layers=(0, 7)), HeadError),
    (E.RoutedHeads(torch.zeros(3, 6, 32)), EditError),
    (E.RoutedHeads(torch.zeros(2, 7, 32)), EditError),
    (E.Streaming(heads="0.1"), EditError),
    (E.SigmoidAttention(heads="0.1"), EditError),
    (E.VAR((1, 4), dims=[3, 5], tau=20.0), EditError),  # out of reach
    (E.VAR((1, 4), dims=[3, 32], tau=2.0), EditError),
    (E.VHR(selected=torch.ones(1, 2, 3).bool()), EditError),
]
#: noticed in use, with the input or the layer at hand
IN_USE: list[tuple[Edit, str, str]] = [
    (E.PAINT([1]), "right", "pad on the left"),
    (E.ScaleTokens(torch.ones(3, 20), 2.0), "left", "3 samples"),
    (E.VHR(selected=torch.ones(3, 2, 4).bool(), scope="all"), "left", "3 samples"),
    (E.VAR(tau=2.0), "left", "has none"),
]


@pytest.mark.parametrize(("edit", "kind"), REFUSED, ids=lambda x: getattr(x, "name", ""))
def test_what_this_model_cannot_take_changes_nothing(
    tapped: Tapped, edit: Edit, kind: type[InterpError]
) -> None:
    model, _ = tapped("llama")
    ids = tokens()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(kind) as error, model.edit(E.ScaleHeads({"0.0": 5.0}), edit):
            pytest.fail("entered")
        one_sentence(error)
        assert (
            model.observers_and_edits() == ([], [])
            and model.module.config._attn_implementation == "sdpa"
        )
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(("edit", "side", "says"), IN_USE, ids=lambda x: getattr(x, "name", ""))
def test_what_an_input_does_not_allow(tapped: Tapped, edit: Edit, side: str, says: str) -> None:
    model, _ = tapped("llama")
    ids, mask = tokens(), left_padded(True)
    mask = mask.flip(1) if side == "right" else mask
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(EditError, match=says) as error, model.edit(edit):
            model(input_ids=ids, attention_mask=mask)
        one_sentence(error)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_prompt_in_pieces_is_refused_by_act(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    ids = tokens()
    with torch.no_grad(), model.edit(E.ACT(0.2)):
        out = model(input_ids=ids[:, :8], use_cache=True)
        with pytest.raises(EditError, match="whole prompt"):
            model(input_ids=ids[:, 8:], past_key_values=out.past_key_values)


def test_encoders_are_refused_by_streaming_and_others_by_name() -> None:
    import tiny
    import transformers as hf

    from interp_hooks import hook

    torch.manual_seed(0)
    model = hook(hf.BertForMaskedLM(hf.BertConfig(vocab_size=101, **tiny.BASE)).eval())
    for edit in (E.Streaming(1, 2), E.Gate(0.5, 1, 2)):
        with (
            torch.no_grad(),
            pytest.raises(EditError, match=f"{edit.name} needs a causal model"),
            model.edit(edit),
        ):
            model(input_ids=tokens())


def test_files_that_are_no_edits(tmp_path: Path) -> None:
    path = tmp_path / "edit.json"
    path.write_bytes(b'[{"edit": "act"}]\xff')
    with pytest.raises(EditError, match="UTF-8"):
        E.load(path)
    path.write_text(
        '[{"edit": "act", "beta": 0.5}]', encoding="utf-8-sig"
    )  # as Windows editors write it
    assert E.load(path) == [E.ACT(0.5)]
    with pytest.raises(EditError, match="has no setting 'betaa'; did you mean beta"):
        E.from_json({"edit": "act", "betaa": 0.5})
    with pytest.raises(EditError, match="gamma of zero_tuning is a number"):
        E.from_json({"edit": "zero_tuning", "gamma": None})


def test_what_is_no_edit_is_told(tapped: Tapped) -> None:
    model = tapped("llama")[0]
    for run in (model.edit, model.explain):
        for given, says in (([E.ACT()], "one by one"), ("act.json", "is not an edit")):
            with pytest.raises(EditError, match=says):
                made = run(given)  # type: ignore[arg-type]
                if run == model.edit:
                    made.__enter__()  # type: ignore[union-attr]
