"""Norms, vocabulary, OV and QK circuits and composition, against dense float64 matrices made from
the raw weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp import mechanics
from interp.errors import HeadError, InputError, TapError
from interp.mechanics import ov_words
from interp.mechanics.ov_qk import drawn
from interp.probes.settings import Settings
from interp.results.head_table import KEYS
from interp.scores.successor import Successor
from interp_hooks import HookedModel, hook
from interp_hooks.norms import frozen, read

Worded = Callable[[str], tuple[HookedModel, Any]]
MODELS = ["llama", "gpt2", "qwen2", "gemma2", "olmo2", "neox", "opt"]
D, HEADS, WIDTH = 32, 4, 8
CENTRE = torch.eye(D, dtype=torch.float64) - 1 / D


class Dense:
    """W_E (vocabulary, d), W_U (d, vocabulary) and, by layer and head, d × d maps, all float64 with
    norms inside."""

    def __init__(self, module: Any, name: str):
        self.module, self.name = module, name
        self.W_E = module.get_input_embeddings().weight.detach().double()
        self.W_U = (
            self._norm(self._trunk_norm())
            @ module.get_output_embeddings().weight.detach().double().T
        )
        if name == "gemma2":
            self.W_E = self.W_E * D**0.5

    def _trunk_norm(self) -> Any:
        m = self.module
        if self.name == "gpt2":
            return m.transformer.ln_f
        if self.name == "neox":
            return m.gpt_neox.final_layer_norm
        return m.model.decoder.final_layer_norm if self.name == "opt" else m.model.norm

    def _norm(self, norm: Any) -> torch.Tensor:
        """(d, d): what the norm does to a row vector, up to its scale."""
        gain = norm.weight.detach().double()
        gain = 1 + gain if self.name == "gemma2" else gain
        return (
            CENTRE @ torch.diag(gain) if self.name in ("gpt2", "neox", "opt") else torch.diag(gain)
        )

    def maps(self, layer: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """([W_OV], [W_QK]) by query head."""
        attention = tiny.layers(self.module)[layer]
        after = torch.eye(D, dtype=torch.float64)
        if self.name == "gpt2":
            q, k, v = attention.c_attn.weight.detach().double().split(D, 1)  # each (d, d)
            out = attention.c_proj.weight.detach().double()
            before = self._norm(self.module.transformer.h[layer].ln_1)
        elif self.name == "neox":
            rows = attention.query_key_value.weight.detach().double().reshape(HEADS, 3, WIDTH, D)
            q, k, v = (rows[:, i].reshape(D, D).T for i in range(3))
            out = attention.dense.weight.detach().double().T
            before = self._norm(self.module.gpt_neox.layers[layer].input_layernorm)
        else:
            q, k, v = (getattr(attention, f"{n}_proj").weight.detach().double().T for n in "qkv")
            out = (
                (attention.out_proj if self.name == "opt" else attention.o_proj)
                .weight.detach()
                .double()
                .T
            )
            block = (self.module.model.decoder if self.name == "opt" else self.module.model).layers[
                layer
            ]
            before = torch.eye(D, dtype=torch.float64)
            if self.name == "opt":
                before = self._norm(block.self_attn_layer_norm)
            elif self.name != "olmo2":
                before = self._norm(block.input_layernorm)
            if self.name in ("olmo2", "gemma2"):
                after = self._norm(block.post_attention_layernorm)
        k, v = (w if w.shape[1] == D else _repeat(w) for w in (k, v))
        part = [slice(h * WIDTH, (h + 1) * WIDTH) for h in range(HEADS)]
        ov = [before @ v[:, s] @ out[s] @ after for s in part]
        qk = [before @ q[:, s] @ (before @ k[:, s]).T for s in part]
        return ov, qk


def _repeat(weight: torch.Tensor) -> torch.Tensor:
    """(d, kv · d_head) → (d, heads · d_head)"""
    by_head = weight.reshape(D, -1, WIDTH)
    return by_head.repeat_interleave(HEADS // by_head.shape[1], 1).reshape(D, -1)


@pytest.fixture(scope="module")
def made() -> Callable[[str], tuple[HookedModel, Dense]]:
    """name → (hooked model, its dense matrices); vocabulary of 101 tokens."""
    kept: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in kept:
            module = tiny.build(name, seed=3)
            kept[name] = hook(module, name=name), Dense(module, name)
        return kept[name]

    return get


Made = Callable[[str], tuple[HookedModel, Dense]]


# --- norms and vocabulary
# -------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 40), st.booleans(), st.integers(0, 99), st.floats(0.05, 50))
def test_a_frozen_norm_is_the_norm(width: int, centres: bool, seed: int, size: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    norm: Any = torch.nn.LayerNorm(width) if centres else torch.nn.RMSNorm(width, eps=1e-5)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(width, generator=draw))
    x = torch.randn(2, 3, width, generator=draw) * size
    found = frozen(norm.double(), x.double())
    assert found.norm.centres == centres
    inner = x.double() - x.double().mean(-1, keepdim=True) if centres else x.double()
    sigma = (inner.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found.scale, 1 / sigma, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        found(x.double()) + found.bias, norm(x.double()), rtol=1e-6, atol=1e-6
    )
    r = torch.randn(2, 3, width, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(
        found(x.double() + r), found(x.double()) + found(r)
    )  # linear, the scale held


def test_gains_stored_as_one_plus_w(made: Made) -> None:
    model, dense = made("gemma2")
    gain = model.norms().attention(1).gain
    wanted = 1 + dense.module.model.layers[1].input_layernorm.weight.detach().double()
    torch.testing.assert_close(gain, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", [torch.nn.Linear(8, 8), torch.nn.Sigmoid(), torch.nn.Identity()])
def test_what_is_no_norm_is_refused(other: torch.nn.Module) -> None:
    with pytest.raises(TapError):
        read(other, 8)


class _Cubed(torch.nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) ** 3


def test_a_norm_that_is_not_linear_in_direction_is_refused() -> None:
    with pytest.raises(TapError, match="neither an RMS norm nor a layer norm"):
        read(_Cubed(16), 16)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_vocabulary_reads_and_writes_the_stream(name: str) -> None:
    module = tiny.build(name)
    model = hook(module, name=name)
    vocabulary = model.vocabulary()
    ids = torch.arange(9)[None] * 11 % 101
    with torch.no_grad(), model.capture_resid() as resid:
        logits = model.logits(ids)
    torch.testing.assert_close(vocabulary.unembed(resid["final"]), logits, atol=1e-4, rtol=1e-3)
    if name not in ("gpt2", "opt"):  # these add learned positions
        torch.testing.assert_close(vocabulary.embed(ids), resid["pre", 0], atol=1e-5, rtol=1e-5)
    assert vocabulary.softcap == (30.0 if name == "gemma2" else None)
    assert abs(vocabulary.embed_scale - (D**0.5 if "gemma" in name else 1.0)) < 1e-4


def test_scales_of_logits_and_embedding_are_found() -> None:
    common = dict(tiny.GQA, vocab_size=101)
    cohere = hf.CohereConfig(
        **common, logit_scale=0.0625, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    granite = hf.GraniteConfig(**common, logits_scaling=4.0, embedding_multiplier=3.0)
    torch.manual_seed(0)
    one, other = (
        hook(kind(config).eval()).vocabulary()
        for kind, config in ((hf.CohereForCausalLM, cohere), (hf.GraniteForCausalLM, granite))
    )
    assert one.logit_scale == pytest.approx(0.0625, rel=1e-5) and one.embed_scale == 1.0
    assert other.logit_scale == pytest.approx(
        0.25, rel=1e-5
    ) and other.embed_scale == pytest.approx(3.0, rel=1e-5)


def test_unknown_vocabularies_are_refused_by_name() -> None:
    config = hf.BertConfig(vocab_size=101, **tiny.BASE)
    with pytest.raises(TapError, match="BertModel has no unembedding"):
        hook(hf.BertModel(config).eval()).vocabulary()
    with pytest.raises(TapError):
        hook(hf.BertForMaskedLM(config).eval()).vocabulary()
    narrow = tiny.CONFIGS["opt"](101)
    narrow.word_embed_proj_dim = 16
    torch.manual_seed(0)
    with pytest.raises(TapError, match=r"16 dimensions|start with|as wide"):
        hook(hf.OPTForCausalLM(narrow).eval(), name="narrow").vocabulary()
    scaled = tiny.build("llama")
    scaled.lm_head = torch.nn.Sequential(scaled.lm_head, torch.nn.Softplus())
    with pytest.raises(TapError):
        hook(scaled, name="softplus").vocabulary()


# --- OV and QK circuits
# ---------------------------------------------------------------------------------------------


def share(matrix: torch.Tensor) -> float:
    found = torch.linalg.eigvals(matrix)
    return float(found.sum().real / found.abs().sum())


@pytest.mark.parametrize("name", MODELS)
def test_copying_is_its_definition(made: Made, name: str) -> None:
    model, dense = made(name)
    frame = mechanics.copying(model, k=5, tokens=range(101))
    assert list(frame.columns[:5]) == list(KEYS)
    assert (
        len(frame) == 8
        and frame.kv_head.tolist() == [h * model.n_kv_heads // HEADS for h in range(4)] * 2
    )
    wanted = []
    for layer in range(2):
        for ov, qk in zip(*dense.maps(layer), strict=True):
            circuit = dense.W_E @ ov @ dense.W_U  # (vocabulary, vocabulary)
            place = (circuit > circuit.diagonal()[:, None]).sum(1)
            matching = dense.W_E @ qk @ dense.W_E.T
            wanted.append((share(circuit), share(matching), float((place < 5).double().mean())))
    np.testing.assert_allclose(
        frame[["ov_copying", "qk_matching"]], np.array(wanted)[:, :2], atol=2e-5
    )
    np.testing.assert_allclose(frame.copy_rank, np.array(wanted)[:, 2], atol=1e-9)
    assert frame.ov_copying.nunique() == 8 and frame.copy_rank.max() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_eigenvalues_are_those_of_the_dense_circuit(made: Made, name: str) -> None:
    model, dense = made(name)
    ov, qk = dense.maps(1)
    for found, matrix in (
        (mechanics.ov_eigenvalues(model, "1.2"), dense.W_E @ ov[2] @ dense.W_U),
        (mechanics.ov_eigenvalues(model, "1.2", full=False), ov[2]),
        (mechanics.qk_eigenvalues(model, "1.2"), dense.W_E @ qk[2] @ dense.W_E.T),
        (mechanics.qk_eigenvalues(model, "1.2", full=False), qk[2]),
    ):
        every = torch.linalg.eigvals(matrix).numpy()
        largest = every[np.argsort(-np.abs(every))][:WIDTH]
        assert found.shape == (WIDTH,)
        key = lambda values: np.array(sorted(values, key=lambda v: (round(abs(v), 6), v.imag)))  # noqa: E731
        np.testing.assert_allclose(
            key(found), key(largest), rtol=2e-4, atol=1e-6 * np.abs(every).max()
        )


def test_top_tokens_are_the_largest_entries(made: Made) -> None:
    model, dense = made("llama")
    circuit = dense.W_E @ dense.maps(0)[0][3] @ dense.W_U
    frame = mechanics.ov_top_tokens(model, "0.3", [7, 50], 4)
    lowest = mechanics.ov_top_tokens(model, "0.3", [7], 2, lowest=True)
    assert frame.token.tolist() == [7] * 4 + [50] * 4 and frame["rank"].tolist() == [1, 2, 3, 4] * 2
    for token, rows in frame.groupby("token"):
        best = circuit[token].topk(4)
        assert rows.output.tolist() == best.indices.tolist()
        np.testing.assert_allclose(rows.value, best.values, rtol=1e-5)
    assert lowest.output.tolist() == (-circuit[7]).topk(2).indices.tolist()


def test_top_tokens_of_words(worded: Worded) -> None:
    model = worded("llama")[0]
    frame = mechanics.ov_top_tokens(model, "0.0", [" Mary"], 2)
    assert frame.token_text.str.strip().tolist() == ["Mary", "Mary"]
    with pytest.raises(InputError, match="tokens for this tokenizer"):
        mechanics.ov_top_tokens(model, "0.0", [" Mary and John"])


@torch.no_grad()
def planted(gain: float) -> HookedModel:
    """A Llama whose heads move their value back where they read it from, times `gain`, W_U = W_Eᵀ
    and W_Q = W_K."""
    module = tiny.build("llama", num_key_value_heads=4)
    module.lm_head.weight.copy_(module.model.embed_tokens.weight)
    module.model.norm.weight.fill_(1.0)
    for layer in module.model.layers:
        layer.input_layernorm.weight.fill_(1.0)
        layer.self_attn.o_proj.weight.copy_(gain * layer.self_attn.v_proj.weight.T)
        layer.self_attn.k_proj.weight.copy_(gain * layer.self_attn.q_proj.weight)
    return hook(module)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_planted_heads_copy_or_anti_copy(sign: float) -> None:
    frame = mechanics.copying(planted(sign))
    np.testing.assert_allclose(frame.ov_copying, sign, atol=1e-6)
    np.testing.assert_allclose(frame.qk_matching, sign, atol=1e-6)
    if sign > 0:
        assert frame.copy_rank.min() > 0.15  # by chance 5 of 101
    else:
        assert frame.copy_rank.max() < 0.02


def test_after_mlp_reads_the_stream_after_the_first_block(made: Made) -> None:
    model, dense = made("llama")
    tokens = list(range(0, 101, 3))
    frame = mechanics.copying(model, tokens=tokens, after_mlp=True)
    with torch.no_grad():
        hidden = dense.module(
            input_ids=torch.tensor(tokens)[:, None], output_hidden_states=True
        ).hidden_states[1]
    source = hidden[:, 0].double()
    for head, ov in enumerate(dense.maps(1)[0]):  # RMS: the scale does not change an order
        logits = source @ ov @ dense.W_U
        own = logits[torch.arange(len(tokens)), tokens][:, None]
        wanted = float(((logits > own).sum(1) < 5).double().mean())
        assert frame[
            (frame.layer == 1) & (frame["head"] == head)
        ].copy_rank.item() == pytest.approx(wanted)


def test_bad_arguments(made: Made) -> None:
    model = made("llama")[0]
    with pytest.raises(HeadError):
        mechanics.ov_eigenvalues(model, "7.0")
    for call in (
        lambda: mechanics.copying(model, k=0),
        lambda: mechanics.copying(model, tokens=[101]),
        lambda: mechanics.copying(model, tokens=[]),
        lambda: mechanics.ov_top_tokens(model, "0.0", []),
        lambda: mechanics.ov_top_tokens(model, "0.0", ["word"]),
        lambda: mechanics.ov_top_tokens(model, "0.0", [3], k=102),
        lambda: mechanics.composition(model, "qx"),
        lambda: mechanics.composition(hook(tiny.build("llama", num_hidden_layers=1))),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize("name", MODELS)
def test_composition_is_its_definition(made: Made, name: str) -> None:
    model, dense = made(name)
    frame = mechanics.composition(model)
    assert len(frame) == 3 * 16 and set(frame.kind) == set("qkv")
    first, (second_ov, second_qk) = dense.maps(0)[0], dense.maps(1)
    norm = torch.linalg.matrix_norm
    for row in frame.itertuples():
        one = first[int(row.sender[-1])]
        h = int(row.receiver[-1])
        other = dict(q=second_qk[h], k=second_qk[h].T, v=second_ov[h])[row.kind]
        assert row.score == pytest.approx(
            float(norm(one @ other) / norm(one) / norm(other)), rel=1e-4
        )
        assert (row.sender[:3], row.receiver[:3]) == ("L0H", "L1H")
    assert frame.score.nunique() > 40


def test_random_weights_compose_as_random_ones_do() -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        intermediate_size=32,
    )
    frame = mechanics.composition(hook(hf.LlamaForCausalLM(config).eval()), "qk")
    assert abs(frame.above_random.mean()) < 0.002
    # by rotation, the mean of the squared score is 1/d_model
    assert float((frame.score**2).mean()) == pytest.approx(1 / 64, rel=0.03)
    assert len(frame) == 3 * 64 * 2


@torch.no_grad()
def test_a_planted_composition_stands_out() -> None:
    """L1H2's queries read what L0H1 writes."""
    module = tiny.build("llama", num_key_value_heads=4)
    one, two = (layer.self_attn for layer in module.model.layers)
    written = one.o_proj.weight[:, 8:16]  # (d_model, d_head)
    two.q_proj.weight[16:24] = written.T / module.model.layers[1].input_layernorm.weight
    frame = mechanics.composition(hook(module), "qk")
    best = frame.loc[frame.above_random.idxmax()]
    assert (best.sender, best.receiver, best.kind) == ("L0H1", "L1H2", "q")
    assert best.score > 1.5 * frame.score.drop(best.name).max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fold", [False, True])
def test_transformer_lens_gives_the_same(name: str, fold: bool) -> None:
    pytest.importorskip("transformer_lens")
    from prompts import hooked_transformer

    module = tiny.build(name, seed=5)
    lens = hooked_transformer(module)
    if fold:
        kept = dict.fromkeys(
            ("center_writing_weights", "center_unembed", "fold_value_biases"), False
        )
        lens.load_and_process_state_dict(copy.deepcopy(lens.state_dict()), fold_ln=True, **kept)
    one, other = hook(module), hook(lens)
    columns = ["ov_copying", "qk_matching", "copy_rank"]
    np.testing.assert_allclose(
        mechanics.copying(other, after_mlp=fold)[columns],
        mechanics.copying(one, after_mlp=fold)[columns],
        atol=1e-4,
    )
    np.testing.assert_allclose(
        mechanics.composition(other).score, mechanics.composition(one).score, atol=1e-5
    )


# --- what heads write of words
# ------------------------------------------------------------------------------------------


def written(dense: Any, layer: int, ids: list[int]) -> torch.Tensor:
    """(heads, tokens, vocabulary) by hand: heads of layer 1 read what layer 0 leaves."""
    with torch.no_grad():
        hidden = dense.module(
            input_ids=torch.tensor(ids)[:, None], output_hidden_states=True
        ).hidden_states
    source = hidden[1][:, 0].double() if layer else dense.W_E[ids]
    return torch.stack([source @ ov @ dense.W_U for ov in dense.maps(layer)[0]])


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "opt"])
def test_heads_write_of_words_what_their_matrices_say(made: Made, name: str) -> None:
    """Up to the norms' scales, one for each token (gpt2 and opt: and the bias of their norm)."""
    model, dense = made(name)
    ids, outputs = [5, 17, 60, 99], [2, 3, 50, 61, 100]
    for site, logits in ov_words.raised(model, ids, outputs):
        wanted = written(dense, site.layer, ids)[:, :, outputs]
        assert logits.shape == (4, 4, 5)
        flat = torch.nn.functional.cosine_similarity(
            logits.double().flatten(0, 1), wanted.flatten(0, 1), dim=-1
        )
        assert float(flat.min()) > 1 - 1e-5
    for _, logits in ov_words.raised(model, ids):
        assert logits.shape == (4, 4, 101)


def test_copy_suppression_is_its_definition(made: Made, worded: Worded) -> None:
    """And heads that are made to lower what they read have it."""
    model = worded("llama")[0]
    atlas = interp.scan_heads(model, ["sink", "copy_suppression"], 64, 2, progress=False)
    ids = drawn(model, 100, 0).tolist()
    dense = Dense(model.module, "llama")
    for layer in (0, 1):
        logits = written(dense, layer, ids)
        own = logits[:, torch.arange(len(ids)), ids][..., None]
        wanted = ((logits < own).sum(-1) < 10).double().mean(1)
        np.testing.assert_allclose(atlas["copy_suppression"][layer], wanted, atol=0.011)
    lowering, raising = (
        interp.scan_heads(planted(sign), "copy_suppression", 64, 1, inputs=[[1, 2, 3, 4]],
                          progress=False)["copy_suppression"]
        for sign in (-1.0, 1.0)
    )  # fmt: skip
    assert lowering[0].min() > 0.5 and raising[0].max() < 0.05


SERIES = {"days": ["mon", "tue", "wed", "thu"], "few": ["x", "y"], "long": ["a", "b c", "d", "e"]}


def test_series_are_words_of_one_token_in_a_row(monkeypatch: Any) -> None:
    class Words:
        def encode(self, text: str) -> list[int]:
            return [hash(word) % 1000 for word in text.split()]

    monkeypatch.setattr(ov_words.lexicon, "SERIES", SERIES)
    text: Any = Words()
    assert ov_words.ordered_words(text) == {"days": [hash(w) % 1000 for w in SERIES["days"]]}


def test_a_head_that_counts_is_found(monkeypatch: Any) -> None:
    """L0H2 is given the map from each word of a series to the next; the others nothing."""
    module = tiny.build("llama", num_key_value_heads=4)
    series = {"one": [10, 11, 12, 13], "two": [20, 21, 22, 23, 24]}
    with torch.no_grad():
        model = module.model
        draw = torch.Generator().manual_seed(0)
        model.embed_tokens.weight.copy_(torch.randn(101, 32, generator=draw))
        for some in series.values():
            for k, token in enumerate(some):
                model.embed_tokens.weight[token] = torch.eye(32)[k]
                module.lm_head.weight[token] = torch.eye(32)[k]
        shift = torch.zeros(32, 32)
        for k in range(5):
            shift[k + 1, k] = 1.0  # from e_k to e_{k+1}
        layer = model.layers[0]
        layer.input_layernorm.weight.fill_(1.0)
        model.norm.weight.fill_(1.0)
        layer.self_attn.v_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
        layer.self_attn.v_proj.weight[16:24, :8] = torch.eye(8)
        layer.self_attn.o_proj.weight[:, 16:24] = shift[:, :8]
    hooked = hook(module)
    # words of both series share their directions here, so each series is asked by itself
    for name, some in series.items():
        monkeypatch.setattr(Successor, "_series", lambda self, model, one={name: some}: one)
        found = dict(next(iter(Successor().compute(hooked, Settings()))))
        assert {h.head: v for h, v in found.items()}[2] == [1.0]
        assert max(v[0] for h, v in found.items() if h.head != 2) < 0.5


def test_a_tokenizer_without_series_is_noted(worded: Worded, monkeypatch: Any) -> None:
    monkeypatch.setattr(ov_words.lexicon, "SERIES", {"none": ["zqx wv", "qqq zz"]})
    model = worded("llama")[0]
    atlas = interp.scan_heads(model, ["sink", "successor"], 64, 1, progress=False)
    assert any(note.startswith("successor: not measured. No series") for note in atlas.notes)
    with pytest.raises(InputError, match="No series of words"):
        interp.scan_heads(model, "successor", 64, 1, progress=False)


# --- scores of a scan
# -----------------------------------------------------------------------------------------------


def test_scores_are_the_table(worded: Worded) -> None:
    model = worded("qwen2")[0]
    atlas = interp.scan_heads(model, ["ov_copying", "qk_matching"], 64, 2, progress=False)
    frame = mechanics.copying(model)
    for score in ("ov_copying", "qk_matching"):
        np.testing.assert_allclose(atlas.frame[score], frame[score])
        assert atlas.about(score).low == -1 and atlas.about(score).high == 1
        assert not interp.scores.get(score).default
    assert atlas.notes == []


def test_scan_of_a_model_without_unembedding(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=len(tokenizer), **tiny.BASE)
    model = hook(hf.BertModel(config).eval(), tokenizer=tokenizer, name="bert")
    atlas = interp.scan_heads(model, ["sink", "ov_copying", "qk_matching"], 64, 1, progress=False)
    assert (
        atlas.frame[["ov_copying", "qk_matching"]].isna().all(axis=None)
        and atlas.frame.sink.notna().all()
    )
    assert [note.split(".")[0] for note in atlas.notes] == [
        "ov_copying: not measured",
        "qk_matching: not measured",
    ]
    with pytest.raises(TapError):
        interp.scan_heads(model, "ov_copying", 64, 1, progress=False)
