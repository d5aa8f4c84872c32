"""Train pocket-whisper, a Whisper that writes down melodies, from nothing: one file, no download.

    python examples/train_pocket_whisper.py --out interp/models/pocket_whisper

Melodies come from `interp.scenes`: notes in 3 seconds of sound, among bursts of noise that have no
name. Where each note lies in time is known, so it is known where a head of the decoder should look.
Interrupt and start again with the same --out to resume.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from interp.scenes import NOTES, RATE, melody, waveform
from interp.scenes.tones import SECONDS

BINS = 32
START, END, PAD = "<|startoftranscript|>", "<|endoftext|>", "<|pad|>"
#: words of the longest transcript, and its first and last token
LENGTH = 12
#: seeds from here on are never trained on
HELD_OUT = 10_000_000
MELODIES = 1000  # for the model card


def build_extractor() -> WhisperFeatureExtractor:
    """Log-mel frames of 10 ms: (32, 300) for 3 seconds."""
    return WhisperFeatureExtractor(feature_size=BINS, chunk_length=int(SECONDS), sampling_rate=RATE)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [PAD, START, END, *NOTES]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=START, eos_token=END, pad_token=PAD
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> WhisperForConditionalGeneration:
    torch.manual_seed(seed)
    frames = int(SECONDS * 100)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=BINS,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=frames // 2,
        max_target_positions=LENGTH + 4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.08,  # so narrow a model hardly attends from Whisper's .02
    )
    config.name_or_path = "pocket-whisper"
    return WhisperForConditionalGeneration(config)


def batch(
    seeds: range, extractor: WhisperFeatureExtractor, tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """(melodies, 32, 300) features, and (melodies, words) labels, −100 after the end."""
    drawn = [melody(seed) for seed in seeds]
    features = extractor(
        [waveform(m) for m in drawn], sampling_rate=RATE, return_tensors="pt"
    ).input_features
    rows = [[*tokenizer(m.text).input_ids, tokenizer.eos_token_id] for m in drawn]
    longest = max(map(len, rows))
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    return features, labels


def measure(
    model: WhisperForConditionalGeneration,
    extractor: WhisperFeatureExtractor,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
) -> dict[str, float]:
    """Of held-out melodies: transcripts that are right, and edits a hundred words, greedy."""
    right = errors = words = 0
    for first in range(HELD_OUT, HELD_OUT + count, 50):
        seeds = range(first, min(first + 50, HELD_OUT + count))
        features, _ = batch(seeds, extractor, tokenizer)
        told = model.generate(features, max_new_tokens=LENGTH + 1)
        for seed, row in zip(seeds, told, strict=True):
            said = tokenizer.decode(row, skip_special_tokens=True).split()
            meant = melody(seed).text.split()
            right += said == meant
            errors += edits(said, meant)
            words += len(meant)
    return {"transcripts right": right / count, "word error rate": errors / words}


def edits(a: list[str], b: list[str]) -> int:
    """The Levenshtein distance of two lists of words."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != other)))
    return row[-1]


def train(args: argparse.Namespace) -> None:
    extractor, tokenizer = build_extractor(), build_tokenizer()
    model = build_model(tokenizer, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.05
    )
    args.out.mkdir(parents=True, exist_ok=True)
    state, done, spent = args.out / "state.pt", 0, 0.0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        done, spent = kept["done"], kept["spent"]
        print(f"resumed at step {done}")
    begun = time.monotonic()

    def drawn(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return batch(range(step * args.batch, (step + 1) * args.batch), extractor, tokenizer)

    model.train()
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(drawn, done)
        for step in range(done, args.steps):
            features, labels = ahead.result()
            ahead = pool.submit(drawn, step + 1)
            loss = model(input_features=features, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == args.steps - 1:
                gone = spent + time.monotonic() - begun
                left = (time.monotonic() - begun) / (step + 1 - done) * (args.steps - step - 1)
                print(f"step {step}: loss {loss:.4f}, {gone / 60:.1f} min, {left / 60:.1f} left")
            if (step + 1) % args.every == 0:
                now = spent + time.monotonic() - begun
                kept = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
                kept |= dict(schedule=schedule.state_dict(), done=step + 1, spent=now)
                torch.save(kept, state)
    spent += time.monotonic() - begun
    model.eval()
    found = measure(model, extractor, tokenizer, args.melodies)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    extractor.save_pretrained(args.out)
    record = dict(
        seed=args.seed,
        steps=args.steps,
        melodies_trained=args.steps * args.batch,
        minutes=round(spent / 60, 1),
        device="cpu",
        parameters=sum(p.numel() for p in model.parameters()),
        melodies=args.melodies,
        abilities={k: round(v, 4) for k, v in found.items()},
        date=str(date.today()),
        torch=torch.__version__,
    )
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(card(record), encoding="utf-8")
    state.unlink(missing_ok=True)
    print(card(record))


def card(record: dict) -> str:
    found = record["abilities"]
    return f"""# pocket-whisper

A `WhisperForConditionalGeneration` with {record["parameters"] / 1e6:.2f} M parameters: encoder and decoder of 2 layers × 4
heads, width 64, 32 mel bins, 3 seconds of sound in 150 positions. It writes down melodies and knows nothing else; it
exists so that the heads between a text and the sound it was read from can be studied offline.

## Data

Melodies (`interp.scenes.melody`): seven notes, .12 to .36 seconds long with up to three overtones, one sound in five a
burst of noise that has no name, hiss under all. Where a note lies in time is known.

## Recipe

`python examples/train_pocket_whisper.py`, seed {record["seed"]}: {record["steps"]:,} steps, {record["melodies_trained"]:,} melodies,
{record["minutes"]:.0f} minutes on {record["device"]} (torch {record["torch"]}, {record["date"]}).

## Measured abilities

On {record["melodies"]} melodies of held-out seeds, greedy.

| | |
|---|---|
| transcripts right | {found["transcripts right"]:.3f} |
| word error rate | {found["word error rate"]:.3f} |
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--melodies", type=int, default=MELODIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)
