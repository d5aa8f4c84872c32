"""What a scan keeps behind its numbers, against dense weights and matrices in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from prompts import hooked_transformer

import interp
from interp.inputs.pieces import pieces
from interp.mechanics import composition, ov_directions
from interp.probes.settings import Settings
from interp.results.evidence import Evidence
from interp.scan.evidence import KEPT, evidence_of
from interp_hooks import Head

SETTINGS = Settings(context=48, samples=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return interp.load("llama")


@pytest.fixture(scope="module")
def kept(model: Any) -> Evidence:
    return evidence_of(model, SETTINGS)


@torch.no_grad()
def moves(model: Any, plain: Any, row: list[int]) -> dict[str, np.ndarray]:
    """head → (queries, keys) a‖v W_O‖ from eager weights and values, 0 at the first key."""
    ids = torch.tensor([row])
    found, values = {}, {}

    def note(place: str, layer: int, x: torch.Tensor) -> None:
        if place == "v":
            values[layer] = x[0].double()

    with model.projections(note):
        model.logits(ids)
    for layer, a in enumerate(plain(ids, output_attentions=True).attentions):
        W_O = model.head_weights(layer).W_O.double()
        group = a.shape[1] // values[layer].shape[1]
        for h in range(a.shape[1]):
            norm = (values[layer][:, h // group] @ W_O[h]).norm(dim=1)
            dense = a[0, h].double() * norm
            dense[:, 0] = 0
            found[f"L{layer}H{h}"] = dense.numpy()
    return found


def test_passages_are_where_heads_move_the_stream_most(model: Any, kept: Evidence) -> None:
    plain = tiny.eager(model.module)
    rows = SETTINGS.rows(model.tokenizer)
    dense = [moves(model, plain, row) for row in rows]
    texts = [pieces(model.tokenizer, row) for row in rows]
    for head in map(str, model.heads):
        passages = kept.of(head).passages
        assert 1 <= len(passages) <= KEPT
        best = max(d[head].max() for d in dense)
        np.testing.assert_allclose(passages[0].moves, best, rtol=1e-3)
        assert [p.moves for p in passages] == sorted((p.moves for p in passages), reverse=True)
        for p in passages:
            np.testing.assert_allclose(p.moves, dense[p.sample][head][p.query, p.key], rtol=1e-3)
            np.testing.assert_allclose(p.moves, dense[p.sample][head][p.query].max(), rtol=1e-3)
            by_role = {role: text for text, role in p.parts if role}
            text = texts[p.sample]
            if p.query == p.key:
                assert by_role == {"both": text[p.query]}
            else:
                assert by_role == {"query": text[p.query], "key": text[p.key]}
            joined = "".join(t for t, _ in p.parts if t not in ("…", " … "))
            if " … " not in "".join(t for t, _ in p.parts):
                assert joined in "".join(text)


@torch.no_grad()
def test_promoted_tokens_are_those_of_the_whole_output(model: Any, kept: Evidence) -> None:
    rows = SETTINGS.rows(model.tokenizer)
    norm, vocabulary = model.norms().final(), model.vocabulary()
    for head in (Head(1, 5), Head(3, 0), Head(0, 2)):
        for p in kept.of(str(head)).passages:
            with model.capture_z() as z:
                model.logits(torch.tensor([rows[p.sample]]))
            write = z[head.layer][0, p.query, head.head].double()
            write = write @ model.head_weights(head.layer).W_O[head.head].double()
            raised = (write * norm.gain) @ vocabulary.W_U.double()
            top = raised.topk(3).indices.tolist()
            assert list(p.promotes) == [pieces(model.tokenizer, [i])[0] for i in top]


def test_directions_are_those_of_the_full_svd(model: Any) -> None:
    found = ov_directions(model, k=2, tokens=5)
    norms, vocabulary = model.norms(), model.vocabulary()
    W_E, W_U = vocabulary.W_E.double(), vocabulary.W_U.double()
    for layer in range(model.n_layers):
        weights, gain = model.head_weights(layer), norms.attention(layer).gain
        for h in (0, 5):
            W_OV = (gain[:, None] * weights.W_V[h].double()) @ weights.W_O[h].double()
            u, s, w = torch.linalg.svd(W_OV)
            for i, one in enumerate(found[f"L{layer}H{h}"]):
                np.testing.assert_allclose(
                    one.share, float(s[i] ** 2 / s.square().sum()), rtol=1e-3
                )
                raised = (w[i] * norms.final().gain) @ W_U
                ends = {tuple(raised.topk(5).indices.tolist()),
                        tuple((-raised).topk(5).indices.tolist())}  # fmt: skip
                assert {tuple(one.promotes), tuple(one.lowers)} == ends
                sign = 1 if tuple(raised.topk(5).indices.tolist()) == tuple(one.promotes) else -1
                along = sign * (W_E @ u[:, i]) / W_E.norm(dim=1)
                assert one.reads == along.topk(5).indices.tolist()


def test_partners_are_the_strongest_compositions(model: Any, kept: Evidence) -> None:
    frame = composition(model)
    for head in ("L0H0", "L2H3", "L3H7"):
        for side, other, earlier in (("receiver", "sender", True), ("sender", "receiver", False)):
            for kind in "qkv":
                rows = frame[(frame[side] == head) & (frame.kind == kind)]
                best = rows.nlargest(2, "above_random")
                mine = [p for p in kept.of(head).partners if (p.earlier, p.kind) == (earlier, kind)]
                assert [p.head for p in mine] == best[other].tolist()
                np.testing.assert_allclose([p.score for p in mine], best.score, rtol=1e-4)


def test_a_scan_keeps_it_and_resumes_with_it(tmp_path: Path, model: Any) -> None:
    scan = dict(context=48, samples=2, progress=False)
    atlas = interp.scan_heads(model, ["previous_token"], out=tmp_path / "scan", **scan)
    assert atlas.evidence is not None and atlas.evidence.settings == dict(texts=2, tokens=48)
    again = interp.Atlas.load(tmp_path / "scan")
    assert again.evidence == atlas.evidence
    text = str(again.card("L0H2"))
    assert "previous-token head: previous token 0.9" in text and "▸" in text
    again.evidence = None
    again.save(tmp_path / "scan")  # that of another scan does not stay behind
    assert interp.Atlas.load(tmp_path / "scan").evidence is None


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt", "mistral", "transformer_lens"])
def test_other_architectures(name: str) -> None:
    lens = name == "transformer_lens"
    model = interp.load(hooked_transformer(tiny.build("gpt2")) if lens else tiny.build(name))
    rows = tuple(tuple(range(start, start + 20)) for start in (1, 41))
    found = evidence_of(model, Settings(context=20, samples=2, inputs=rows))
    assert all(found.of(str(h)).passages for h in model.heads)
    assert all(0 < p.weight <= 1.001 for h in model.heads for p in found.of(str(h)).passages)


def test_an_encoder_looks_forward_too() -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = interp.load(hf.BertModel(config).eval())
    found = evidence_of(model, Settings(context=20, samples=1, inputs=(tuple(range(1, 21)),)))
    passages = [p for h in model.heads for p in found.of(str(h)).passages]
    assert any(p.key > p.query for p in passages)
    assert found.notes  # what it promotes can't be said


def test_the_strongest_passage_says_who_built_its_score(model: Any, kept: Evidence) -> None:
    rows = SETTINGS.rows(model.tokenizer)
    for name in ("L1H5", "L2H4", "L3H1"):
        one = kept.of(name)
        first = max(one.passages, key=lambda p: p.weight)  # the one that is shown first
        found = interp.mechanics.qk_attribution(
            model, torch.tensor([rows[first.sample]]), name, first.query, first.key
        )
        assert one.built is not None and one.built.score == pytest.approx(found.score, rel=1e-4)
        for side, values in ((one.built.query, found.by_query()), (one.built.key, found.by_key())):
            assert len(side) == 3
            for writer, value in side:
                assert value == pytest.approx(values[writer], abs=1e-3, rel=1e-3)
        assert abs(one.built.key[0][1]) >= abs(one.built.key[1][1])


def test_evidence_without_it_is_read(kept: Evidence, tmp_path: Path) -> None:
    import json

    path = kept.save(tmp_path) / "evidence.json"
    said = json.loads(path.read_text())
    for one in said["heads"].values():
        assert one.pop("built")["key"]
    path.write_text(json.dumps(said))
    assert Evidence.load(tmp_path).of("L2H4").built is None
