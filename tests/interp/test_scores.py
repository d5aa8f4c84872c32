"""Every score against its definition, written anew here from eager attention matrices; resuming;
O(L) memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import interp
from interp import scores
from interp.errors import InputError, UnknownNameError
from interp.probes.catalogue import registry
from interp.probes.needle import NeedleProbe
from interp.probes.probe import ProbeBatch
from interp.probes.settings import Settings
from interp.scan.plan import Plan
from interp.scan.run import plan_scan
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.task import Instance
from interp_hooks import HookedModel, hook

Worded = Callable[[str], tuple[HookedModel, Any]]
CONTEXT, SAMPLES, SEED = 96, 3, 4
SETTINGS = Settings(CONTEXT, SAMPLES, SEED)
MODELS = ["llama", "gpt2"]
NIAH = NeedleInAHaystack()
#: what text-only models have; others are tested in test_vision_scores.py and test_site_scores.py
OF_TEXT = [
    n for n in scores.names() if not (scores.get(n).needs_images or scores.get(n).needs_site)
]
#: filled by tests of their own below
APART = {"retrieval", "retrieval_activation"}
#: without samples; tested in test_mechanics_weights.py
FROM_WEIGHTS = {"ov_copying", "qk_matching", "successor", "copy_suppression"}
#: tested in test_causal_scores.py
CAUSAL = {"cri", "function_vector"}
#: tested in test_sentence_links.py, and in test_in_context.py
OF_SENTENCES = {"receiver", "in_context"}
#: tested in test_safety_heads.py
OF_SAFETY = {"ships", "ships_excess"}


# --- definitions: one sample's attention of one layer, A (heads, queries, keys) float64 → (heads,)
# -----------------


def sink(a: torch.Tensor) -> torch.Tensor:
    return a[:, :, 0].mean(-1)


def sink_rate(a: torch.Tensor) -> torch.Tensor:
    return (a[:, :64, 0].sum(-1) / 64 > 0.3).double()


def later_sink(a: torch.Tensor) -> torch.Tensor:
    t = a.shape[-1]
    # key k (from 0) is seen by t − k queries; only keys seen by a quarter of the context, 64 at
    # most
    return torch.stack(
        [a[:, k:, k].mean(-1) for k in range(1, t) if t - k >= min(64, t // 4)]
    ).amax(0)


def entropy(a: torch.Tensor) -> torch.Tensor:
    return -torch.where(a > 0, a * a.clamp_min(1e-300).log(), 0).sum(-1).mean(-1)


def max_prob(a: torch.Tensor) -> torch.Tensor:
    return a.amax(-1).mean(-1)


def back(a: torch.Tensor) -> torch.Tensor:
    slots = torch.arange(a.shape[-1])
    return (slots[:, None] - slots).double().clamp_min(0)


def distance(a: torch.Tensor) -> torch.Tensor:
    return (a * back(a)).sum(-1).mean(-1)


def waad(a: torch.Tensor) -> torch.Tensor:
    return (a * back(a).clamp(max=10)).sum(-1).mean(-1)


def local(a: torch.Tensor) -> torch.Tensor:
    return torch.stack([a[:, q, max(0, q - 9) : q + 1].sum(-1) for q in range(a.shape[1])]).mean(0)


def fai(a: torch.Tensor) -> torch.Tensor:
    t = a.shape[-1]
    # whole bands only: 41 queries from s + 10 to s + 50, s > first token
    return torch.stack([a[:, s + 10 : s + 51, s].mean(-1) for s in range(1, t - 50)]).amax(0)


TEXT = dict(
    sink=sink,
    sink_rate=sink_rate,
    later_sink=later_sink,
    entropy=entropy,
    max_prob=max_prob,
    distance=distance,
    waad=waad,
    local=local,
    fai=fai,
)


def previous_token(a: torch.Tensor, start: int, n: int) -> torch.Tensor:
    return torch.stack([a[:, q, q - 1] for q in range(1, a.shape[1])]).mean(0)


def duplicate_token(a: torch.Tensor, start: int, n: int) -> torch.Tensor:
    return torch.stack([a[:, q, q - n] for q in range(start + n, start + 2 * n)]).mean(0)


def induction(a: torch.Tensor, start: int, n: int) -> torch.Tensor:
    return torch.stack([a[:, q, q - n + 1] for q in range(start + n, start + 2 * n)]).mean(0)


REPEAT = dict(previous_token=previous_token, duplicate_token=duplicate_token, induction=induction)


def qr(a: torch.Tensor, needle: tuple[int, int], question: tuple[int, int]) -> torch.Tensor:
    """One prompt's half: mean over question tokens of the mass on each needle token, without low
    outliers."""
    per_token = a[:, question[0] : question[1], needle[0] : needle[1]].mean(1)  # (heads, needle)
    floor = per_token.mean(-1, keepdim=True) - 2 * per_token.std(-1, keepdim=True)
    return (per_token * (per_token >= floor)).sum(-1)


def forced(a: torch.Tensor, instance: Instance) -> torch.Tensor:
    """Distinct needle tokens w for which the row before w in the answer looks most at a w in the
    needle."""
    start, stop = instance.info["needle"]
    needle = set(instance.ids[start:stop])
    answer = [accepted[0] for accepted in instance.accept]
    shares = []
    for head in a:
        copied = set()
        for row, token in zip(instance.positions, answer, strict=True):
            j = int(head[row].argmax())
            if start <= j < stop and instance.ids[j] == token:
                copied.add(token)
        shares.append(len(copied) / len(needle))
    return torch.tensor(shares, dtype=torch.float64)


def locos(plain: Any, batch: ProbeBatch) -> list[torch.Tensor]:
    """φ key by key, in float64, from eager attention, values and the weights themselves."""
    instance = batch.info["instance"]
    start, stop = instance.info["needle"]
    values: dict[int, torch.Tensor] = {}
    with tiny.reading_values(plain, 0, values), tiny.reading_values(plain, 1, values):
        rows = eager_rows(plain, batch.input_ids[0])
    unembedding = plain.get_output_embeddings().weight.detach().double()  # (vocabulary, d_model)
    found = []
    for layer, a in enumerate(rows):
        module = tiny.layers(plain)[layer]
        out = module.o_proj.weight.T if hasattr(module, "o_proj") else module.c_proj.weight
        w_o = out.detach().double().reshape(4, -1, out.shape[1])  # (heads, d_head, d_model)
        sums = torch.zeros(4, dtype=torch.float64)
        for row, (token,) in zip(instance.positions, instance.accept, strict=True):
            for h in range(4):
                phi = [
                    a[h, row, j] * (unembedding[token] @ (values[layer][0, h, j] @ w_o[h]))
                    for j in range(row + 1)
                ]
                inside = sum(phi[start:stop])
                outside = sum(phi[:start]) + sum(phi[stop:])
                n = stop - start
                sums[h] += inside - n / (row + 1 - n) * outside
        found.append(sums / len(instance.positions))
    return found


# --- what eager attention gives
# -------------------------------------------------------------------------------------


def eager_rows(plain: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """A (heads, queries, keys) of each layer for one unpadded row."""
    return [a[0] for a in tiny.attentions(plain, input_ids=ids[None])[0]]


def own_definition(name: str, tokenizer: Any, plain: Any) -> np.ndarray:
    """(samples, layers, heads) of a score by the definitions above."""
    probe = scores.get(name).probe
    probe = "text" if probe == "own" else probe
    found = []
    for batch in registry.get(probe).batches(tokenizer, SETTINGS):
        if name in TEXT:
            found += [[TEXT[name](a) for a in eager_rows(plain, ids)] for ids in batch.input_ids]
        elif name in REPEAT:
            start, n = batch.info["start"], batch.info["repeat"]
            found += [
                [REPEAT[name](a, start, n) for a in eager_rows(plain, ids)]
                for ids in batch.input_ids
            ]
        elif name == "dormancy":
            prose, code = (eager_rows(plain, ids) for ids in batch.input_ids)
            found.append([sink(p) - sink(c) for p, c in zip(prose, code, strict=True)])
        elif name == "qr":
            halves = []
            for ids, mask, spans in zip(
                batch.input_ids, batch.attention_mask, batch.info["spans"], strict=True
            ):
                pad = int((mask == 0).sum())
                (n0, n1), (q0, q1) = spans
                rows = eager_rows(plain, ids[pad:])  # without its padding
                halves.append([qr(a, (n0 - pad, n1 - pad), (q0 - pad, q1 - pad)) for a in rows])
            found.append([x - y for x, y in zip(*halves, strict=True)])
        elif name == "value_drain":
            values: dict[int, torch.Tensor] = {}
            with (
                torch.no_grad(),
                tiny.reading_values(plain, 0, values),
                tiny.reading_values(plain, 1, values),
            ):
                plain(input_ids=batch.input_ids)
            norms = [values[layer][0].norm(dim=-1) for layer in range(2)]
            found.append([1 - n[:, 0] / n[:, 1:].mean(-1) for n in norms])
        elif name == "retrieval_forced":
            instance = batch.info["instance"]
            rows = eager_rows(plain, batch.input_ids[0])
            found.append([forced(a, instance) for a in rows])
        elif name == "locos":
            found.append(locos(plain, batch))
        elif name == "residual_peak":
            with torch.no_grad():
                hidden = plain(input_ids=batch.input_ids, output_hidden_states=True).hidden_states
            norms = [hidden[layer][0].double().norm(dim=-1) for layer in range(2)]
            found.append([(n[0] / n[1:].mean()).expand(4) for n in norms])
        elif name == "importance":
            base = loss(plain, batch.input_ids)
            table = torch.zeros(2, 4, dtype=torch.float64)
            for layer in range(2):
                for head in range(4):
                    gain = torch.ones(4, 1)
                    gain[head] = 0
                    with tiny.rewriting_z(plain, layer, lambda z, gain=gain: z * gain):
                        table[layer, head] = loss(plain, batch.input_ids) - base
            found.append(list(table))
        elif name == "importance_gradient":
            found.append([slope.abs() for slope in finite_differences(plain, batch.input_ids)])
        else:
            raise AssertionError(
                f"The score {name} has no definition in this test; write it from docs/methods.md."
            )
    return np.array([[v.double().numpy() for v in sample] for sample in found])


def finite_differences(plain: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """∂loss/∂ξ_h by central differences of a factor ξ on each head's z, in float64 (Llama's norm
    rounds to float32, so the step is no smaller)."""
    exact, step = copy.deepcopy(plain).double(), 1e-2
    found = []
    for layer in range(2):
        row = []
        for head in range(4):
            losses = []
            for sign in (1, -1):
                gain = torch.ones(4, 1, dtype=torch.float64)
                gain[head] += sign * step
                with tiny.rewriting_z(exact, layer, lambda z, gain=gain: z * gain):
                    losses.append(loss(exact, ids))
            row.append((losses[0] - losses[1]) / (2 * step))
        found.append(torch.stack(row))
    return found


@torch.no_grad()
def loss(plain: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = plain(input_ids=ids).logits.double().log_softmax(-1)
    return -logits[0, :-1].gather(-1, ids[0, 1:, None]).mean()


@pytest.fixture(scope="module")
def atlases(worded: Worded) -> Callable[[str], interp.Atlas]:
    """All scores of a model, scanned once."""
    made: dict[str, interp.Atlas] = {}

    def get(name: str) -> interp.Atlas:
        if name not in made:
            made[name] = interp.scan_heads(
                worded(name)[0], "all", CONTEXT, SAMPLES, SEED, progress=False, force=True
            )
        return made[name]

    return get


@pytest.mark.parametrize(
    "score",
    [n for n in OF_TEXT if n not in APART | FROM_WEIGHTS | CAUSAL | OF_SENTENCES | OF_SAFETY],
)
@pytest.mark.parametrize("name", MODELS)
def test_score_is_its_definition(
    worded: Worded, atlases: Any, tokenizer: Any, name: str, score: str
) -> None:
    atlas, plain = atlases(name), worded(name)[1]
    wanted = own_definition(score, tokenizer, plain)
    assert wanted.shape == (SAMPLES, 2, 4)
    np.testing.assert_allclose(
        np.asarray(atlas[score], float), wanted.mean(0), atol=3e-5, rtol=1e-4
    )
    frame = atlas.frame.sort_values(["layer", "head"])
    error = wanted.std(0, ddof=1).ravel() / np.sqrt(SAMPLES)
    np.testing.assert_allclose(frame[f"{score}_stderr"], error, atol=3e-5, rtol=1e-3)
    if score not in ("sink_rate", "residual_peak", "retrieval_forced"):
        assert (
            len(np.unique(wanted.mean(0).round(9))) > 3
        )  # not a constant that anything would equal


@pytest.mark.parametrize("name", MODELS)
def test_frame_has_a_row_a_head(atlases: Any, name: str) -> None:
    frame = atlases(name).frame
    assert list(zip(frame.layer, frame["head"], strict=True)) == [
        (i, h) for i in range(2) for h in range(4)
    ]
    assert frame.kv_head.tolist() == ([0, 0, 1, 1] * 2 if name == "llama" else [0, 1, 2, 3] * 2)
    assert set(OF_TEXT) <= set(frame.columns)


@pytest.mark.parametrize("name", scores.names())
def test_scores_say_what_they_are(name: str) -> None:
    score = scores.get(name)
    assert score.name == name
    assert score.title and score.reading.endswith(".") and score.formula and score.citation


# --- the inputs of the probes
# ---------------------------------------------------------------------------------------


def test_repeat_probe_repeats(tokenizer: Any) -> None:
    (batch,) = registry.get("repeat").batches(tokenizer, SETTINGS)
    start, n = batch.info["start"], batch.info["repeat"]
    assert batch.input_ids.shape == (SAMPLES, start + 2 * n)
    assert torch.equal(batch.input_ids[:, start : start + n], batch.input_ids[:, start + n :])
    assert all(len(set(row.tolist())) == n + start for row in batch.input_ids)


def test_question_probe_marks_needle_and_question(tokenizer: Any) -> None:
    for batch in registry.get("question").batches(tokenizer, SETTINGS):
        (n0, n1), (q0, q1) = batch.info["spans"][0]
        row = batch.input_ids[0]
        needle, asked = tokenizer.decode(row[n0:n1]), tokenizer.decode(row[q0:q1])
        assert asked.strip().startswith("Question: What is the secret") and asked.endswith("?")
        city = asked.rstrip("?").split()[-1]
        assert f"of {city} is {needle.strip()}." in tokenizer.decode(row)
        (m0, m1), (e0, e1) = batch.info["spans"][1]
        assert tokenizer.decode(batch.input_ids[1][m0:m1]) == needle
        assert tokenizer.decode(batch.input_ids[1][e0:e1]).strip() == "N/A"


def test_text_rows_have_the_context(tokenizer: Any) -> None:
    for batch in registry.get("text").batches(tokenizer, SETTINGS):
        assert batch.input_ids.shape == (1, CONTEXT)
        assert int(batch.input_ids[0, 0]) == tokenizer.bos_token_id


def test_unsolved_retrieval_is_nan_with_a_note(worded: Worded) -> None:
    names = sorted(APART)
    atlas = interp.scan_heads(worded("llama")[0], [*names, "sink"], 96, 3, progress=False)
    for name in names:
        assert atlas.frame[name].isna().all()
    said = f"{', '.join(names)}: not measured. "
    assert any(said in note and "accuracy 0.00 of 3" in note for note in atlas.notes)
    assert atlas.frame["sink"].notna().all()


@pytest.fixture(scope="module")
def rigged(tokenizer: Any) -> tuple[HookedModel, Any, ProbeBatch]:
    """A model that can only say five tokens, and a prompt made of these: greedy answers are in the
    needle."""
    module = tiny.build("llama", len(tokenizer), seed=2)
    alive = [10, 20, 30, 40, 50]
    with torch.no_grad():
        kept = module.lm_head.weight[alive].clone()
        module.lm_head.weight.zero_()
        module.lm_head.weight[alive] = kept
    plain = tiny.eager(module)
    draw = np.random.default_rng(0)
    prompt = [1, *draw.choice(alive, 40).tolist()]
    needle = (6, 22)
    assert set(alive[:4]) & set(prompt[needle[0] : needle[1]])
    with torch.no_grad():
        out = plain.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    answer = out[0, len(prompt) :].tolist()
    first = len(prompt) - 1
    instance = Instance(
        tuple(prompt + answer[:-1]),
        tuple(range(first, first + 8)),
        tuple((t,) for t in answer),
        ((),) * 8,
        tuple(prompt + answer[:-1]),
        dict(needle=needle),
    )
    return (
        hook(module, tokenizer=tokenizer),
        plain,
        ProbeBatch(torch.tensor([prompt]), None, dict(instance=instance, task=NIAH)),
    )


def test_retrieval_is_its_definition(rigged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, batch = rigged
    instance = batch.info["instance"]
    monkeypatch.setattr(NeedleProbe, "batches", lambda self, tokenizer, settings: [batch])
    atlas = interp.scan_heads(model, sorted(APART), 64, 1, progress=False)
    start, stop = instance.info["needle"]
    answer = [a[0] for a in instance.accept]
    needle = set(instance.ids[start:stop])
    copied: dict[tuple[int, int], set[int]] = {(i, h): set() for i in range(2) for h in range(4)}
    for step, token in enumerate(answer):  # a whole eager forward for each greedy step
        ids = torch.tensor([instance.ids[: len(instance.prompt) + step]])
        weights, logits = tiny.attentions(plain, input_ids=ids)
        assert int(logits[0, -1].argmax()) == token
        for (layer, head), got in copied.items():
            strongest = int(weights[layer][0, head, -1].argmax())
            if token in needle and start <= strongest < stop and int(ids[0, strongest]) == token:
                got.add(token)
    wanted = np.array(
        [len(copied[i, h] & needle) / len(needle) for i in range(2) for h in range(4)]
    ).reshape(2, 4)
    assert wanted.max() > 0 and wanted.min() < wanted.max()  # heads differ, so this can fail
    np.testing.assert_allclose(np.asarray(atlas["retrieval"], float), wanted)
    np.testing.assert_allclose(np.asarray(atlas["retrieval_activation"], float), wanted > 0)
    assert any("1 of 1" in note for note in atlas.notes)


def test_forced_retrieval_is_retrieval_where_the_answer_is_the_model_s_own(
    rigged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its greedy answer given, the same rows look at the same keys; with another answer greedy
    decoding strays, and only the forced score is left."""
    model, plain, batch = rigged
    monkeypatch.setattr(NeedleProbe, "batches", lambda self, tokenizer, settings: [batch])
    names = ["retrieval", "retrieval_forced", "locos"]
    atlas = interp.scan_heads(model, names, 64, 1, progress=False)
    assert np.asarray(atlas["retrieval"], float).max() > 0
    np.testing.assert_allclose(
        np.asarray(atlas["retrieval_forced"], float), np.asarray(atlas["retrieval"], float)
    )
    assert any("1 of 1 of them" in note for note in atlas.notes)
    instance = batch.info["instance"]
    needle = instance.ids[slice(*instance.info["needle"])]
    answer = [t for t in needle if t != instance.accept[0][0]][:3]
    strayed = Instance(
        (*instance.prompt, *answer[:-1]),
        tuple(range(len(instance.prompt) - 1, len(instance.prompt) + 2)),
        tuple((t,) for t in answer),
        ((),) * 3,
        (*instance.prompt, *answer[:-1]),
        dict(instance.info),
    )
    other = ProbeBatch(torch.tensor([instance.prompt]), None, dict(instance=strayed, task=NIAH))
    monkeypatch.setattr(NeedleProbe, "batches", lambda self, tokenizer, settings: [other])
    atlas = interp.scan_heads(model, names, 64, 1, progress=False)
    assert np.isnan(np.asarray(atlas["retrieval"], float)).all()
    rows = eager_rows(plain, torch.tensor(strayed.ids))
    wanted = np.array([forced(a, strayed).numpy() for a in rows])
    np.testing.assert_allclose(np.asarray(atlas["retrieval_forced"], float), wanted)
    assert np.isfinite(np.asarray(atlas["locos"], float)).all()
    assert any("0 of 1 of them" in note for note in atlas.notes)


# --- interrupted and resumed
# --------------------------------------------------------------------------------------


class Forwards:
    """Counts forwards of a module."""

    def __init__(self, module: torch.nn.Module):
        self.n = 0
        self._handle = module.register_forward_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.n += 1

    def during(self, run: Callable[[], Any]) -> int:
        before = self.n
        run()
        return self.n - before

    def stop(self) -> None:
        self._handle.remove()


@pytest.fixture
def forwards(worded: Worded) -> Iterator[Forwards]:
    counter = Forwards(worded("llama")[0].module)
    yield counter
    counter.stop()


WHAT = ["sink", "induction", "dormancy", "value_drain", "importance"]


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_interrupted_scan_resumes(
    worded: Worded,
    forwards: Forwards,
    tmp_path: Path,
    stop_after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Plan, "_gathers_evidence", False)  # runs of its own, at the end
    model = worded("llama")[0]

    def plan() -> Any:
        return plan_scan(model, WHAT, 48, SAMPLES, SEED)

    def interrupt(done: int, total: int, label: str) -> None:
        calls.append(label)
        if len(calls) > stop_after:
            raise KeyboardInterrupt

    calls: list[str] = []
    whole = plan()
    full = forwards.during(lambda: whole.run(None))
    wanted = plan().run(None).frame
    first, second, third = plan(), plan(), plan()
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path, interrupt)
    saved = len(list((tmp_path / "partial").glob("*.parquet")))
    assert saved == stop_after
    results = []
    rest = forwards.during(lambda: results.append(second.run(tmp_path)))
    pd.testing.assert_frame_equal(results[0].frame, wanted, check_exact=True)
    jobs = list(whole._jobs())
    costs = [1] * (len(jobs) - 1) + [
        len(model.heads) + 1
    ]  # a forward a batch; importance: one a head and one more
    assert full == sum(costs)
    assert rest == sum(costs[stop_after:])
    assert not (tmp_path / "partial").exists()
    assert interp.Atlas.load(tmp_path).scores == results[0].scores
    assert forwards.during(lambda: third.run(tmp_path)) == full  # a finished scan starts anew


def test_a_plan_that_was_run_is_the_same_plan(worded: Worded, tmp_path: Path) -> None:
    """What probes note of their batches changes no fingerprint, so that another run resumes."""
    model = worded("llama")[0]
    plan = plan_scan(model, ["sink", "retrieval", "retrieval_forced"], 128, 2, SEED)
    before = plan.record()["fingerprint"]
    found = plan.run(tmp_path).frame
    assert plan.record()["fingerprint"] == before
    pd.testing.assert_frame_equal(plan.run(tmp_path).frame, found, check_exact=True)


def test_pieces_of_another_scan_are_not_used(
    worded: Worded, forwards: Forwards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "_gathers_evidence", False)  # runs of its own, at the end
    model = worded("llama")[0]

    def stop(done: int, total: int, label: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_scan(model, ["sink"], 48, SAMPLES, seed=1).run(tmp_path, stop)
    assert list((tmp_path / "partial").glob("*.parquet"))
    other = plan_scan(model, ["sink"], 48, SAMPLES, seed=2)
    results = []
    assert forwards.during(lambda: results.append(other.run(tmp_path))) == SAMPLES
    pd.testing.assert_frame_equal(
        results[0].frame, plan_scan(model, ["sink"], 48, SAMPLES, seed=2).run(None).frame
    )


def test_same_seed_same_scan_other_seed_other_scan(worded: Worded) -> None:
    model = worded("gpt2")[0]
    one, two, other = (
        interp.scan_heads(model, ["sink", "induction"], 48, 2, s, progress=False).frame
        for s in (0, 0, 1)
    )
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert not np.allclose(one.sink, other.sink, atol=1e-7)


class NoSquare(TorchDispatchMode):
    """Fails on any tensor with as many elements as one head's L × L matrix."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self.limit:
                    raise MemoryError(f"{func} made a tensor of shape {tuple(tensor.shape)}")
        return out


@pytest.fixture(scope="module")
def long_models(tokenizer: Any) -> Callable[[str], HookedModel]:
    def get(name: str) -> HookedModel:
        size = dict(n_positions=1024) if name == "gpt2" else dict(max_position_embeddings=1024)
        return hook(tiny.build(name, len(tokenizer), **size), name=name, tokenizer=tokenizer)

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_default_scan_makes_no_square_tensor(long_models: Any, name: str) -> None:
    model, length = long_models(name), 1024
    plan = plan_scan(model, "default", length, 1)
    with NoSquare(length * length) as watch:
        plan.run(None)
    assert watch.largest > length  # it did watch
    everything = [n for n in OF_TEXT if n != "importance"]
    plan = plan_scan(model, everything, length, 1)
    with NoSquare(length * length):
        plan.run(None)


def test_the_watch_sees_eager_attention(long_models: Any) -> None:
    model = long_models("llama")
    model.backend = "reference"
    plan = plan_scan(model, ["sink"], 1024, 1)
    with pytest.raises(MemoryError), NoSquare(1024 * 1024):
        plan.run(None)


def test_a_selection_adds_and_takes_out() -> None:
    """ "default" and "all" stand for their scores, in the registry's order; "-x" takes x out."""
    every = scores.names()
    default = [n for n in every if scores.get(n).default]

    def chosen(which: str | list[str]) -> list[str]:
        return [s.name for s in scores.select(which)]

    assert chosen("all") == every and chosen("default") == default
    assert chosen("all,-importance") == [n for n in every if n != "importance"]
    assert chosen(["all", "-importance", "-sink"]) == [
        n for n in every if n not in ("importance", "sink")
    ]
    assert chosen("default, +qr, -sink") == [n for n in default if n != "sink"] + ["qr"]
    assert chosen("sink,-sink,sink") == ["sink"] and chosen("default,-qr") == default
    with pytest.raises(UnknownNameError, match=r"importence.*did you mean importance"):
        scores.select("all,-importence")
    with pytest.raises(InputError, match=r"default,-sink or all,-sink"):
        scores.select("-sink")


def test_the_plan_counts_every_piece_and_the_bar_is_full_at_the_end_only(worded: Worded) -> None:
    model = worded("llama")[0]
    every = [n for n in OF_TEXT if n not in ("importance",)]
    plan = plan_scan(model, every, 96, 2, SEED)
    pieces = {f"{p}-{i:04d}" for p, batches in plan._batches.items() for i in range(len(batches))}
    own = {f"own-{s.name}" for s in plan._own}
    assert set(plan._seconds) == pieces | own and all(s > 0 for s in plan._seconds.values())
    assert plan.seconds > sum(plan._seconds.values())
    told: list[tuple[float, str]] = []
    plan.run(None, lambda done, total, what: told.append((done / total, what)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[0] == 0
    assert told[-1] == (1.0, "done") and all(share < 1 for share in shares[:-1])
    assert "saving" in {what for _, what in told}


def test_a_decode_step_counts(worded: Worded, tokenizer: Any) -> None:
    """A needle problem costs its prefill and its steps; one with more steps costs more."""
    model = worded("llama")[0]

    class Told:
        model = worded("llama")[0]

        def plain(self, rows: int, length: int) -> float:
            return float(rows * length)

        def step(self) -> float:
            return 1000.0

    (batch, *_) = registry.get("needle").make(model, SETTINGS)
    steps = len(batch.info["instance"].accept)
    found = registry.get("needle").seconds(batch, Told())  # type: ignore[arg-type]
    assert found == batch.input_ids.shape[1] + 1000 * steps
