"""Why a head looks where it looks, against explicit loops in float64 and eager attentions."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from prompts import hooked_transformer
from typer.testing import CliRunner

import interp
from interp import mechanics
from interp.cli.main import app
from interp.errors import ContextError, HeadError, InputError, TapError
from interp.inputs.pieces import pieces
from interp.scan.built import Edge, built_of
from interp_hooks import hook

IDS = torch.arange(3, 20)[None] * 7 % 101
QUERY, KEY, OTHER = 12, 9, 8


def phi(**more: Any) -> Any:
    torch.manual_seed(0)
    config = hf.PhiConfig(
        vocab_size=101, **tiny.GQA, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more
    )
    module = hf.AutoModelForCausalLM.from_config(config).eval()
    tiny.stir(module)
    return module


def built(name: str) -> Any:
    return phi() if name == "phi" else tiny.build(name, seed=3)


def capped(found: mechanics.QKAttribution) -> float:
    """What the softmax sees, from the table alone."""
    score = float(found.table.sum())
    if found.softcap is not None:
        score = found.softcap * math.tanh(score / found.softcap)
    return score + found.mask_bias


# --- the table's sum is the score


@pytest.mark.parametrize("name", [*tiny.CONFIGS, "phi"])
def test_the_tables_sum_is_the_score(name: str) -> None:
    """Against the eager twin's attentions: ln A[q, k] − ln A[q, k'] is the difference of scores."""
    module = built(name)
    model, plain = hook(module, name=name), tiny.eager(module)
    attentions = tiny.attentions(plain, input_ids=IDS)[0]
    for head in (0, 2):
        one, two = (mechanics.qk_attribution(model, IDS, (1, head), QUERY, k) for k in (KEY, OTHER))
        for found in (one, two):
            assert abs(float(found.table.sum()) - found.score) <= 1e-5 * max(1, abs(found.score))
        row = attentions[1][0, head, QUERY]
        wanted = float(row[KEY].log() - row[OTHER].log())
        assert capped(one) - capped(two) == pytest.approx(wanted, abs=2e-5, rel=1e-4)
        assert one.weight == pytest.approx(float(row[KEY]), rel=1e-4)
        assert len(one.writers) >= 6 and str(one.writers[1 + ("position" in map(str, one.writers))
                                                         ]) == "L0H0"  # fmt: skip
    first = mechanics.qk_attribution(model, IDS, "L0H1", QUERY, KEY)
    assert {w.component for w in first.writers} <= {"embedding", "position", "bias"}
    assert float(first.table.sum()) == pytest.approx(first.score, rel=1e-5, abs=1e-6)


def test_in_float64_it_is_exact() -> None:
    model = hook(tiny.build("gpt2", seed=3).double())
    found = mechanics.qk_attribution(model, IDS, "L1H2", QUERY, KEY)
    assert float(found.table.sum()) == pytest.approx(found.score, rel=1e-6, abs=1e-8)


# --- the parts are what they are called


def stream_parts(plain: Any, name: str) -> dict[str, torch.Tensor]:
    """writer → (tokens, d_model) float64 of what is in the stream on entry of layer 1, by hooks."""
    z: list[torch.Tensor] = []
    pre: list[torch.Tensor] = []
    blocks = plain.transformer.h if name == "gpt2" else plain.model.layers

    def enters(module: Any, args: tuple, kwargs: dict) -> None:
        pre.append((args[0] if args else kwargs["hidden_states"])[0].double())

    handles = [b.register_forward_pre_hook(enters, with_kwargs=True) for b in blocks]
    with torch.no_grad(), tiny.rewriting_z(plain, 0, lambda value: z.append(value) or value):
        plain(input_ids=IDS)
    for handle in handles:
        handle.remove()
    out = tiny.output_module(tiny.layers(plain)[0])
    W = out.weight.detach().double() if name == "gpt2" else out.weight.detach().double().T
    parts = {f"L0H{h}": z[0][0, :, h].double() @ W[8 * h : 8 * h + 8] for h in range(4)}
    if name == "gpt2":
        token = plain.transformer.wte.weight.detach()[IDS[0]].double()
        parts |= {"embedding": token, "position": pre[0] - token}
        parts["b_O 0"] = out.bias.detach().double().expand(IDS.shape[1], -1)
    else:
        parts["embedding"] = pre[0]
    parts["MLP 0"] = pre[1] - sum(parts.values())
    return parts


def rotated(x: torch.Tensor, position: int, theta: float) -> list[float]:
    """RoPE of one vector, pair by pair (i, i + d/2)."""
    half = len(x) // 2
    out = [0.0] * len(x)
    for i in range(half):
        angle = position / theta ** (2 * i / len(x))
        a, b = float(x[i]), float(x[i + half])
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_each_cell_by_hand(name: str) -> None:
    """Norm, projection, norm of queries and keys, rotation, one writer at a time."""
    module = tiny.build(name, seed=4)
    plain = tiny.eager(module)
    parts = stream_parts(plain, name)
    block, eps = plain.model.layers[1], plain.config.rms_norm_eps
    x = sum(parts.values())
    gain = block.input_layernorm.weight.detach().double()
    theta = plain.config.rope_parameters["rope_theta"]
    head, kv = 2, 1

    def reads(place: str, part: torch.Tensor, position: int, number: int) -> list[float]:
        W = getattr(block.self_attn, f"{place}_proj").weight.detach().double()
        W = W[8 * number : 8 * number + 8]
        scale = 1 / math.sqrt(float(x[position].square().mean()) + eps)
        made = W @ (gain * part[position] * scale)
        if name == "qwen3":
            whole = W @ (gain * x[position] * scale)
            norm = getattr(block.self_attn, f"{place}_norm").weight.detach().double()
            made = norm * made / math.sqrt(float(whole.square().mean()) + eps)
        return rotated(made, position, theta)

    found = mechanics.qk_attribution(hook(module), IDS, (1, head), QUERY, KEY)
    frame = found.frame
    assert set(frame.index) == set(parts)
    for u, wrote_q in parts.items():
        for v, wrote_k in parts.items():
            q, k = reads("q", wrote_q, QUERY, head), reads("k", wrote_k, KEY, kv)
            wanted = sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(8)
            assert frame.loc[u, v] == pytest.approx(wanted, abs=2e-5, rel=1e-3)


def test_each_cell_by_hand_with_biases_and_positions() -> None:
    module = tiny.build("gpt2", seed=4)
    plain = tiny.eager(module)
    parts = stream_parts(plain, "gpt2")
    block = plain.transformer.h[1]
    x, ln, c = sum(parts.values()), block.ln_1, block.attn.c_attn
    gain, shift = ln.weight.detach().double(), ln.bias.detach().double()
    W, b = c.weight.detach().double(), c.bias.detach().double()

    def reads(number: int, part: torch.Tensor | None, position: int, head: int) -> torch.Tensor:
        column = slice(32 * number + 8 * head, 32 * number + 8 * head + 8)
        if part is None:
            return shift @ W[:, column] + b[column]
        spread = math.sqrt(float(x[position].var(unbiased=False)) + ln.eps)
        centred = part[position] - part[position].mean()
        return gain * centred / spread @ W[:, column]

    frame = mechanics.qk_attribution(hook(module), IDS, "L1H3", QUERY, KEY).frame
    sides = {**parts, "bias": None}
    assert set(frame.index) == set(sides)
    for u, wrote_q in sides.items():
        for v, wrote_k in sides.items():
            wanted = reads(0, wrote_q, QUERY, 3) @ reads(1, wrote_k, KEY, 3) / math.sqrt(8)
            assert frame.loc[u, v] == pytest.approx(float(wanted), abs=2e-5, rel=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_norm_after_attention_is_in_its_writers(name: str) -> None:
    """Columns of heads and bias of layer 0 together: what the branch's norm gave, by a hook."""
    module = tiny.build(name, seed=5)
    plain = tiny.eager(module)
    norm = plain.model.layers[0].post_attention_layernorm
    gave: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda m, a, out: gave.append(out[0].double()))
    with torch.no_grad():
        plain(input_ids=IDS)
    handle.remove()
    model = hook(module)
    found = mechanics.qk_attribution(model, IDS, "L1H2", QUERY, KEY)
    heads = [c for c in found.frame.columns if c.startswith("L0H")]
    # the same through the toolkit's own parts: the sum over heads moves as the branch's output does
    with model.capture_resid() as resid:
        model.logits(IDS)
    branch = gave[0][KEY]
    place = "mid" if ("mid", 0) in resid else None
    if place:
        moved = (resid["mid", 0] - resid["pre", 0])[0, KEY].double()
        torch.testing.assert_close(moved, branch, atol=1e-5, rtol=1e-4)
    assert len(heads) == 4 and found.by_key()[heads].abs().min() > 1e-6


# --- which key, through which head, pushes which logit


@pytest.mark.parametrize("name", [*tiny.CONFIGS, "phi"])
def test_keys_sum_to_the_heads_direct_contribution(name: str) -> None:
    module = built(name)
    model = hook(module, name=name)
    u = model.vocabulary().W_U[:, 5]
    found = mechanics.sources(model, IDS, u, None, QUERY)
    one = torch.tensor([0]), torch.tensor([QUERY])
    direct = mechanics.direct(model, IDS, None, u[None], *one)
    wanted = torch.cat([direct.heads[layer][0] for layer in direct.heads])
    torch.testing.assert_close(found.sums(), wanted, atol=1e-5, rtol=1e-4)
    assert found.values.shape == (8, IDS.shape[1]) and not found.values[:, QUERY + 1 :].any()


def test_each_key_by_hand() -> None:
    """Eager weights, values at the projection, W_O and the final norm's formula, key by key."""
    module = tiny.build("llama", seed=6)
    plain = tiny.eager(module)
    a = tiny.attentions(plain, input_ids=IDS)[0][1][0, 3, QUERY]
    values: dict[int, torch.Tensor] = {}
    end: list[torch.Tensor] = []
    handle = plain.model.norm.register_forward_pre_hook(lambda m, x: end.append(x[0][0].double()))
    with torch.no_grad(), tiny.reading_values(plain, 1, values):
        plain(input_ids=IDS)
    handle.remove()
    W_O = tiny.output_module(tiny.layers(plain)[1]).weight.detach().double().T[24:32]
    u = (plain.lm_head.weight[5] - plain.lm_head.weight[8]).detach().double()
    scale = (end[0][QUERY].square().mean() + plain.config.rms_norm_eps).rsqrt()
    gain = plain.model.norm.weight.detach().double()
    model = hook(module)
    W_U = model.vocabulary().W_U
    found = mechanics.sources(model, IDS, W_U[:, 5] - W_U[:, 8], "L1H3", QUERY)
    for key in range(IDS.shape[1]):
        wrote = values[1][0, 3, key] @ W_O
        wanted = float(a[key] * ((gain * wrote * scale) @ u))
        assert float(found.values[0, key]) == pytest.approx(wanted, abs=1e-6, rel=1e-4)
    groups = found.grouped({"first": [0], "some": slice(2, 5)})
    row = found.values[0]
    assert groups.loc["L1H3"].tolist() == pytest.approx(
        [float(row[0]), float(row[2:5].sum()), float(row.sum() - row[0] - row[2:5].sum())]
    )
    best = found.top(1).iloc[0]
    assert best.key == int(row.abs().argmax()) and best.weight == pytest.approx(float(a[best.key]))


# --- who built the scores of many heads


@pytest.mark.parametrize("name", [*tiny.CONFIGS, "phi"])
def test_many_heads_at_once_are_each_alone(name: str) -> None:
    """Sides of every head's table, two heads of a group at one key among them."""
    model = hook(built(name), name=name)
    edges = {s: [Edge(h, QUERY - h, KEY - h // 2) for h in range(4)] for s in model.sites}
    found = built_of(model, IDS[0].tolist(), edges)
    for site, some in edges.items():
        for edge, one in zip(some, found[site], strict=True):
            whole = mechanics.qk_attribution(
                model, IDS, (site.layer, edge.head), edge.query, edge.key
            )
            assert one.score == pytest.approx(whole.score, rel=1e-5, abs=1e-6)
            for side, values in ((one.query, whole.by_query()), (one.key, whole.by_key())):
                wanted = values.to_dict()
                if "position" in wanted:
                    wanted["embedding"] += wanted.pop("position")
                best = sorted(wanted.items(), key=lambda item: -abs(item[1]))[: len(side)]
                assert [n for n, _ in side] == [n for n, _ in best]
                assert [v for _, v in side] == pytest.approx([v for _, v in best], abs=1e-5)


# --- what can't be told is refused


def test_what_makes_no_sense_is_refused() -> None:
    model = interp.load(tiny.build("gemma2"))
    ask = mechanics.qk_attribution
    with pytest.raises(InputError, match="earlier ones"):
        ask(model, IDS, "L1H2", 3, 5)
    with pytest.raises(InputError, match="window"):
        ask(model, IDS, "L0H2", 15, 2)  # layer 0 slides
    with pytest.raises(InputError, match="no query 17"):
        ask(model, IDS, "L1H2", 17, 2)
    with pytest.raises(InputError, match="no key"):
        ask(model, IDS, "L1H2", 5, 1.5)  # type: ignore[arg-type]
    with pytest.raises(HeadError):
        ask(model, IDS, "L9H2", 5, 2)
    with pytest.raises(InputError, match="One text"):
        ask(model, IDS.repeat(2, 1), "L1H2", 5, 2)
    with pytest.raises(InputError, match="tensor"):
        ask(model, [1, 2], "L1H2", 1, 0)  # type: ignore[arg-type]
    u = model.vocabulary().W_U[:, 5]
    with pytest.raises(InputError, match="d_model"):
        mechanics.sources(model, IDS, u[:5])
    with pytest.raises(InputError, match="No head"):
        mechanics.sources(model, IDS, u, [])
    found = mechanics.sources(model, IDS, u, "L1H1")
    with pytest.raises(InputError, match="two groups"):
        found.grouped({"a": [1], "b": slice(0, 3)})
    with pytest.raises(InputError, match="no key 40"):
        found.grouped({"a": [40]})
    with model.edit(interp.edits.Ablate(["L0H1"])):
        with pytest.raises(InputError, match="leave the block"):
            ask(model, IDS, "L1H2", 5, 2)
        with pytest.raises(InputError, match="leave the block"):
            mechanics.sources(model, IDS, u)
    assert torch.is_grad_enabled()


def test_models_that_can_not_be_split_say_so() -> None:
    bert = hf.BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, is_decoder=True,
    )  # fmt: skip
    model = hook(hf.BertLMHeadModel(bert).eval())
    with pytest.raises(TapError):
        mechanics.qk_attribution(model, IDS, "L1H2", 5, 2)
    lens = hooked_transformer(tiny.build("gpt2"))
    with pytest.raises(TapError, match="TransformerLens"):
        mechanics.qk_attribution(hook(lens), IDS, "L1H2", 5, 2)


def test_centred_norms_of_queries_are_read_as_they_are() -> None:
    """Phi's option norms queries and keys by a layer norm with a bias."""
    module = phi(qk_layernorm=True)
    found = mechanics.qk_attribution(hook(module), IDS, "L1H2", QUERY, KEY)
    other = mechanics.qk_attribution(hook(module), IDS, "L1H2", QUERY, OTHER)
    row = tiny.attentions(tiny.eager(module), input_ids=IDS)[0][1][0, 2, QUERY]
    wanted = float(row[KEY].log() - row[OTHER].log())
    assert capped(found) - capped(other) == pytest.approx(wanted, abs=2e-5, rel=1e-4)


# --- model.why and the command line

TEXT = "the cat saw the dog . the cat saw the dog ."


@pytest.fixture(scope="module")
def model() -> Any:
    return interp.load("llama")


def test_what_is_not_given_is_chosen(model: Any) -> None:
    why = model.why(TEXT, "L2H4")
    row = model.attention(TEXT, "L2H4")[-1]
    assert why.qk.query == len(row) - 1
    assert why.qk.key == 1 + int(row[1:].argmax())
    assert why.qk.weight == pytest.approx(float(row[why.qk.key]), rel=1e-4)
    logits = model(TEXT).logits[0, -1]
    assert why.answer == pieces(model.tokenizer, [int(logits.argmax())])[0]
    assert why.frame.to_numpy().sum() == pytest.approx(why.qk.score, rel=1e-5)
    first = model.why(TEXT, "L2H4", query=0)
    assert (first.qk.query, first.qk.key, first.qk.weight) == (0, 0, 1.0)


def test_sides_and_pairs_are_the_tables(model: Any) -> None:
    why = model.why(TEXT, "L2H4", 8, 2)
    table = why.frame
    assert why.by_query().sum() == pytest.approx(why.qk.score, rel=1e-5)
    assert why.by_key().loc["L1H3"] == pytest.approx(table["L1H3"].sum())
    best = why.top(1).iloc[0]
    assert abs(best.score) == table.abs().to_numpy().max() == abs(table.loc[best.query, best.key])
    assert len(why.qk.pairs()) == table.size
    keys = why.keys(None)
    assert keys.value.sum() == pytest.approx(float(why.sources.sums()[0]), rel=1e-6)
    said = json.loads(json.dumps(why.to_dict(4)))
    assert len(said["pairs"]) == 4 and said["edge"]["key_token"] == why.tokens[2]
    shown = why._repr_html_()
    assert "L2H4" in shown and str(best.query) in shown


def test_an_answer_is_held_against_another(model: Any) -> None:
    W_U = model.vocabulary().W_U
    ids = model.tokens(TEXT)["input_ids"]
    cat, dog = (model.tokenizer.encode(w, add_special_tokens=False)[0] for w in (" cat", " dog"))
    wanted = mechanics.sources(model, ids, W_U[:, cat] - W_U[:, dog], "L3H1")
    why = model.why(TEXT, "L3H1", answer=" cat", against=dog)
    torch.testing.assert_close(why.sources.values, wanted.values, atol=1e-7, rtol=1e-4)
    assert (why.answer.strip(), why.against.strip()) == ("cat", "dog")
    with pytest.raises(InputError, match="tokens"):
        model.why(TEXT, "L3H1", answer=" cat dog")
    with pytest.raises(ContextError):
        model.why(torch.ones(1, 99999, dtype=torch.long), "L3H1")


def test_why_on_the_command_line() -> None:
    run = CliRunner().invoke
    shown = run(app, ["why", "--head", "L2H4", "--text", TEXT, "--query", "8", "--key", "2"])
    assert shown.exit_code == 0 and "MLP 0" in shown.stdout
    said = run(app, ["why", "--head", "L2H4", "--text", TEXT, "--json", "--top", "3"])
    document = json.loads(said.stdout)
    assert document["head"] == "L2H4" and len(document["pairs"]) == 3
    for wrong in (["--head", "L9H9"], ["--query", "99"], ["--query", "2", "--key", "5"]):
        failed = run(app, ["why", "--head", "L2H4", "--text", TEXT, *wrong])
        assert failed.exit_code == 2
