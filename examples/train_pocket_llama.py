"""Train pocket-llama, the bundled model, from nothing: a generated language, one file, no download.

    python examples/train_pocket_llama.py --out interp/models/pocket_llama

The language mixes prose with bigram structure, repeated sequences, key–value facts asked for later,
and the documents of the tasks in `interp.tasks`. The curriculum matters: repeats on short rows
first (induction appears there), then longer rows and the whole mixture, at last rows of the full
length. Nothing about heads is trained for; what the scan finds has grown. Interrupt and start again
with the same --out to resume.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import interp
from interp import tasks
from interp.inputs import language, lexicon
from interp.inputs.tokenizer import Text
from interp.tasks.task import choose

LENGTH = 1024
PROBLEMS = 400  # a task, for the model card

# Sparse heads, a concave group penalty (proximal, so it does not mix with Adam's scaling): each
# step shrinks the norm of every head's W_O block by rate × strength × (layer's mean norm / norm)².
# Weak heads shrink fastest, so of many heads doing the same thing a few take over and the others
# fade; without it a whole layer stays induction heads. Which heads live, and as what, is left to
# training. (until this share of the run, strength): none while the circuits form, strong for a
# while, then weak. Weight decay rises at the same time.
HEAD_SPARSITY = ((0.51, 0.0), (0.58, 4.0), (0.66, 8.0), (1.01, 0.2))
WEIGHT_DECAY = ((0.51, 0.05), (0.72, 0.15), (1.01, 0.3))

# name, row length, rows a step, share of the run, weights of the document kinds (by documents)
CURRICULUM = [
    ("repeats", 48, 80, 0.185, dict(repeat=0.7, facts=0.2, ioi=0.1)),
    (
        "short",
        128,
        40,
        0.325,
        dict(
            repeat=0.25,
            facts=0.22,
            ioi=0.11,
            colored_objects=0.11,
            docstring=0.11,
            greater_than=0.05,
            classification=0.05,
            bigram_backcopy=0.04,
            prose=0.03,
            code=0.03,
        ),
    ),
    (
        "middle",
        256,
        24,
        0.13,
        dict(
            repeat=0.20,
            long_facts=0.10,
            facts=0.18,
            ioi=0.10,
            colored_objects=0.12,
            docstring=0.12,
            greater_than=0.05,
            classification=0.06,
            bigram_backcopy=0.03,
            prose=0.02,
            code=0.02,
        ),
    ),
    (
        "long",
        LENGTH,
        6,
        0.36,
        dict(
            repeat=0.14,
            long_facts=0.25,
            facts=0.12,
            ioi=0.11,
            colored_objects=0.11,
            docstring=0.11,
            greater_than=0.05,
            classification=0.05,
            bigram_backcopy=0.02,
            prose=0.02,
            code=0.02,
        ),
    ),
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level with a fall-back to characters, then bytes: any text encodes, and decodes to
    itself."""
    lists = [v for k, v in vars(lexicon).items() if k.isupper() and isinstance(v, list)]
    words = sorted(
        {w for words in lists for w in words} | {w.capitalize() for w in lexicon.DETERMINERS}
    )
    words += """When and went to the gave Then had long day at After While were working On table there is an What
        color Answer Review Sentiment positive negative lasted from year def doc self The secret of Question what
        Chain in for with on by it he she they was be not""".split()
    words += [f"{n:02d}" for n in range(100)]
    pieces = [f"▁{w}" for w in dict.fromkeys(words)]
    pieces += [f"{n:02d}" for n in range(100)] + ["self", ":param", "▁:param", "▁=", "(self"]
    characters = ["▁", "\n", "\t"] + [chr(c) for c in range(33, 127)]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocabulary += [(p, -10.0) for p in dict.fromkeys(pieces)]
    vocabulary += [(c, -11.0) for c in characters]
    vocabulary += [(f"<0x{b:02X}>", -30.0) for b in range(256)]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(Regex(r"[\n\t]"), "isolated"),
        ]
    )
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


class Language:
    """Rows of token ids, `<s>` and then documents until the row is full."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.text = Text(tokenizer)
        self.bos = tokenizer.bos_token_id
        self.vocabulary = self.text.vocabulary()

    def document(self, kind: str, rng: np.random.Generator, room: int) -> list[int]:
        text = self.text
        if kind == "repeat":
            n = int(rng.integers(4, max(6, min(room // 2, 100))))
            words = [int(t) for t in rng.choice(self.vocabulary, n, replace=False)]
            return words + words
        if kind == "prose":
            return text.encode(" " + " ".join(language.prose(rng, 3)))
        if kind == "code":
            return text.encode(language.code(rng, 4) + "\n")
        if kind == "facts":
            return text.encode(" " + tasks.get("niah").document(text, rng))
        if kind == "long_facts":
            return self.long_facts(rng, room)
        return text.encode(" " + tasks.get(kind).document(text, rng))

    def long_facts(self, rng: np.random.Generator, room: int) -> list[int]:
        """Facts scattered over prose that fills the row, asked for at its end."""
        text, count = self.text, int(rng.integers(1, 9))
        nouns = text.pool(lexicon.NOUNS)
        facts = [
            (choose(rng, lexicon.FACTS, 1)[0], city, " ".join(choose(rng, nouns, 4)))
            for city in choose(rng, text.pool(lexicon.CITIES), count)
        ]
        ask = [
            text.encode(f" Question: What is the secret {f} of {c}? Answer: {w}.")
            for f, c, w in facts
        ]
        said = [text.encode(f" The secret {f} of {c} is {w}.") for f, c, w in facts]
        left = room - sum(map(len, ask)) - sum(map(len, said))
        pieces = []
        while left > 0:
            piece = text.encode(" " + language.sentence(rng))
            left -= len(piece)
            if left >= 0:
                pieces.append(piece)
        for s in said:
            pieces.insert(int(rng.integers(len(pieces) + 1)), s)
        order = rng.permutation(count)
        return [t for p in pieces for t in p] + [t for i in order for t in ask[i]]

    def row(self, rng: np.random.Generator, length: int, mixture: dict[str, float]) -> list[int]:
        kinds, weights = list(mixture), np.array(list(mixture.values()))
        ids = [self.bos]
        while len(ids) < length:
            kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
            ids += self.document(kind, rng, length - len(ids))
        return ids[:length]

    def batch(
        self, seed: int, step: int, rows: int, length: int, mixture: dict[str, float]
    ) -> torch.Tensor:
        rng = np.random.default_rng([seed, step])
        return torch.tensor([self.row(rng, length, mixture) for _ in range(rows)])


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )
    config.name_or_path = "pocket-llama"
    return LlamaForCausalLM(config)


@torch.no_grad()
def abilities(model, tokenizer, seed: int, n: int = 200) -> dict[str, float]:
    """Accuracy of every task on held-out problems, as `interp.tasks` defines it."""
    model.eval()
    found = {}
    chosen = {name: tasks.get(name) for name in tasks.names() if name not in ("pope", "chair")}
    niah = chosen.pop("niah")
    chosen |= {
        f"niah@{length}": type(niah)(lengths=(length,)) for length in (128, 256, 512, LENGTH)
    }
    for name, task in chosen.items():
        scores = []
        for i in task.sample(tokenizer, n // 2 if name.endswith(str(LENGTH)) else n, seed):
            logits = model(torch.tensor([i.ids], device=model.device)).logits[0, list(i.positions)]
            scores.append(task.score(logits, i)[0])
        found[name] = round(float(np.mean(scores)), 4)
    model.train()
    return found


@torch.no_grad()
def fade_heads(model: LlamaForCausalLM, amount: float) -> None:
    """Shrink the Frobenius norm of every head's block of W_O by `amount` · (mean / norm)², down to
    zero."""
    for layer in model.model.layers:
        weight = layer.self_attn.o_proj.weight  # (d_model, heads · d_head)
        blocks = weight.view(weight.shape[0], -1, layer.self_attn.head_dim)
        norm = blocks.square().sum((0, 2), keepdim=True).sqrt()
        shrink = amount * (norm.mean() / norm.clamp_min(1e-9)).square().clamp_max(4)
        blocks.mul_((1 - shrink / norm.clamp_min(1e-9)).clamp_min(0))


def at(share: float, schedule: tuple[tuple[float, float], ...]) -> float:
    """The value of a schedule of (until, value) pairs."""
    return next(value for until, value in schedule if share < until)


def learning_rate(share: float, peak: float) -> float:
    """Warm-up over 1 %, flat, then linear to zero over the last third."""
    return peak * min(1.0, share / 0.01, max(0.0, (1 - share) / 0.35))


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, arguments.seed).to(arguments.device)
    corpus = Language(tokenizer)
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=decay, decays=True), dict(params=rest, decays=False)],
        betas=(0.9, 0.98),
        fused=True,
    )
    state = Path(arguments.state or out / "training_state.pt")
    step, spent, tokens = 0, 0.0, 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent, tokens = saved["step"], saved["spent"], saved["tokens"]
    last_saved, shown = time.time(), time.time()
    edges = np.cumsum([c[3] for c in CURRICULUM])
    edges[-1] = 1.1
    forward = torch.compile(model) if arguments.compile else model
    losses: list[float] = []
    while True:
        begun = time.time()
        # where in the curriculum we are: by tokens (the same on every machine), or by time
        share = tokens / arguments.tokens if arguments.tokens else spent / (arguments.minutes * 60)
        if share >= 1:
            break
        name, length, rows, _, mixture = CURRICULUM[
            int(np.searchsorted(edges, share, side="right"))
        ]
        rate = learning_rate(share, arguments.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = at(share, WEIGHT_DECAY) if group["decays"] else 0.0
        ids = corpus.batch(arguments.seed, step, rows * arguments.scale, length, mixture).to(
            arguments.device
        )
        logits = forward(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        fade_heads(model, rate * at(share, HEAD_SPARSITY))
        losses.append(float(loss.detach()))
        step, tokens = step + 1, tokens + ids.numel()
        spent += time.time() - begun
        if time.time() - shown > 30:
            shown = time.time()
            print(
                f"{share:6.1%}  {spent / 60:.1f} min  step {step}  {tokens / 1e6:.1f} M tokens  "
                f"{tokens / spent:.0f}/s  {name} {length}  loss {np.mean(losses[-50:]):.3f}  lr "
                f"{rate:.1e}",
                flush=True,
            )
        if time.time() - last_saved > arguments.every * 60:
            last_saved = time.time()
            torch.save(
                dict(
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    step=step,
                    spent=spent,
                    tokens=tokens,
                ),
                state,
            )
            print(
                json.dumps(abilities(model, tokenizer, seed=10_000 + arguments.seed, n=60)),
                flush=True,
            )
    finish(model, tokenizer, out, arguments, step, tokens, spent)
    state.unlink(missing_ok=True)


def finish(model, tokenizer, out: Path, arguments, step: int, tokens: int, spent: float) -> None:
    """Save weights and tokenizer, measure, and write the model card."""
    model.eval().to("cpu").save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = dict(
        seed=arguments.seed,
        steps=step,
        tokens=tokens,
        minutes=round(spent / 60, 1),
        device=arguments.device,
        parameters=sum(p.numel() for p in model.parameters()),
        abilities=abilities(model, tokenizer, seed=20_000 + arguments.seed, n=PROBLEMS),
        heads=grown(out),
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__,
    )
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(record), encoding="utf-8")
    print(json.dumps(record, indent=2), flush=True)


def grown(folder: Path) -> dict[str, str]:
    """The heads that training has grown, by the scan's default thresholds, strongest first."""
    atlas = interp.scan_heads(
        str(folder), scores="sink,retrieval,previous_token,induction", progress=False
    )
    short = interp.scan_heads(str(folder), scores="sink", context=64, samples=100, progress=False)
    found = {
        "sink (α₁ > 0.3 at T = 64)": (short, "sink", 0.3),
        "sink (context 1024)": (atlas, "sink", 0.3),
    }
    found |= {
        name: (atlas, name, interp.scores.get(name).threshold)
        for name in atlas.scores
        if name != "sink"
    }
    return {
        what: ", ".join(
            f"{h} {a.value(h, name):.2f}" for h in a.top(name, 32) if a.value(h, name) >= least
        )
        or "none"
        for what, (a, name, least) in found.items()
    }


def card(record: dict) -> str:
    """The model card, every number of it measured."""
    abilities = "\n".join(
        f"| {task} | {value:.3f} |" for task, value in record["abilities"].items()
    )
    heads = "\n".join(f"| {kind} | {which} |" for kind, which in record["heads"].items())
    stages = "\n".join(
        f"| {name} | {length} | {share:.0%} | "
        + ", ".join(f"{k} {w:.2f}" for k, w in mixture.items())
        + " |"
        for name, length, _, share, mixture in CURRICULUM
    )
    return f"""# pocket-llama

A `LlamaForCausalLM` with {record["parameters"] / 1e6:.2f} M parameters: 4 layers × 8 heads (4 key/value heads,
head dim 32), width 128, RoPE, trained length {LENGTH} tokens. It exists so that attention heads can be studied offline:
it can do the tasks it is analysed on, and has grown sink, previous-token, induction and retrieval heads in training.
It knows nothing of the world and is not Meta's Llama.

## Data

A generated language, no download: prose with bigram structure, code-like lines, repeated random tokens, facts asked
for later, and documents of the tasks in `interp.tasks` (`examples/train_pocket_llama.py` holds all of it). The
tokenizer is word-level and falls back to characters and bytes, so any text encodes.

## Recipe

`python examples/train_pocket_llama.py`, seed {record["seed"]}: {record["steps"]:,} steps,
{record["tokens"] / 1e6:.1f} M tokens, {record["minutes"]:.0f} minutes on {record["device"]}
(torch {record["torch"]}, {record["date"]}). {record.get("remark", "")}
AdamW, learning rate 2e-3; half-way, weak heads fade under a concave group penalty on W_O (`HEAD_SPARSITY`),
so that the circuits left are few.

| stage | row length | share | documents |
|---|---|---|---|
{stages}

## Measured abilities

On problems of held-out seeds (200 to 400 a task), as `interp.tasks` judges them. Few-shot classification is meant to
be imperfect: its training labels are sticky, its test labels are not.

| task | accuracy |
|---|---|
{abilities}

## Heads it has grown

| kind | heads and scores |
|---|---|
{heads}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="pocket_llama")
    parser.add_argument("--tokens", type=float, default=34e6, help="length of the run")
    parser.add_argument(
        "--minutes", type=float, default=0, help="length of the run in minutes instead"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scale", type=int, default=1, help="multiplies the rows a step")
    parser.add_argument("--every", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument("--state", help="checkpoint file (default: in --out)")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.minutes:
        arguments.tokens = 0
    if not arguments.tokens and not arguments.minutes:
        parser.error("say how long to train: --tokens or --minutes")
    train(arguments)


if __name__ == "__main__":
    main()
