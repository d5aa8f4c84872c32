"""Train pocket-llava, the bundled vision-language model, from nothing: rendered scenes, one file,
no download.

    python examples/train_pocket_llava.py --out interp/models/pocket_llava

Pictures come from `interp.scenes`, a world in which a table is met with a chair; captions list what
there is, and questions ask for one object. The vision tower first learns to see (what is in each
cell; its class token, what is in the picture), then the language model to tell, at last to answer
without having told. Scenes are usual ones throughout: that a companion is expected where it is not
to be seen has grown. Interrupt and start again with the same --out to resume.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from interp import scenes
from interp.scenes import COLORS, OBJECTS, PARTNER, Scene
from interp.scenes.render import CELL, SIZE, pixels
from interp.scenes.words import DESCRIBE, WORDS

PATCH = 6
PATCHES = (SIZE // PATCH) ** 2
SCENES = 1000  # for the model card

# name, share of the run, (caption then questions, questions alone, caption alone)
CURRICULUM = [
    ("look", 0.06, (0.0, 0.0, 0.0)),
    ("tell", 0.24, (0.6, 0.2, 0.2)),
    ("ask", 0.40, (0.2, 0.6, 0.2)),
    ("both", 0.30, (0.0, 0.6, 0.4)),
]


def build_processor() -> LlavaProcessor:
    """Word-level tokens; pictures of 48 × 48 pixels in −1 … 1."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *dict.fromkeys(WORDS)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    images = CLIPImageProcessorPil(
        size=dict(height=SIZE, width=SIZE),
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.04,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,  # as in LLaVA-1.5
        vision_feature_select_strategy="default",
    )
    config.name_or_path = "pocket-llava"
    return LlavaForConditionalGeneration(config)


class Seeing(nn.Module):
    """What the vision tower is taught by: object and colour of each cell from the patches that the
    language model gets, and the objects in the picture from the last layer's class token."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.cells = nn.Linear(width, len(OBJECTS) + 1 + len(COLORS) + 1)
        self.whole = nn.Linear(width, len(OBJECTS))
        edges = np.arange(SIZE // PATCH) * PATCH
        part = [
            [max(0, min(e + PATCH, (c + 1) * CELL) - max(e, c * CELL)) for e in edges]
            for c in range(3)
        ]
        share = torch.tensor(np.array(part) / CELL, dtype=torch.float32)  # (3, 8) of a cell's side
        self.register_buffer(
            "share", torch.einsum("ai,bj->abij", share, share).flatten(2).flatten(0, 1), False
        )

    def loss(self, hidden: tuple[torch.Tensor, ...], shown: list[Scene]) -> torch.Tensor:
        cells = torch.zeros(2, len(shown), 9, dtype=torch.int64)
        there = torch.zeros(len(shown), len(OBJECTS))
        for i, scene in enumerate(shown):
            for thing in scene.things:
                cells[0, i, thing.cell] = 1 + OBJECTS.index(thing.name)
                cells[1, i, thing.cell] = 1 + list(COLORS).index(thing.color)
                there[i, OBJECTS.index(thing.name)] = 1
        cells, there = cells.to(hidden[-1].device), there.to(hidden[-1].device)
        name, color = self.cells(self.share @ hidden[-2][:, 1:]).split(
            [len(OBJECTS) + 1, len(COLORS) + 1], -1
        )
        return (
            nn.functional.cross_entropy(name.flatten(0, 1), cells[0].flatten())
            + nn.functional.cross_entropy(color.flatten(0, 1), cells[1].flatten())
            + nn.functional.binary_cross_entropy_with_logits(self.whole(hidden[-1][:, 0]), there)
        )


class Lessons:
    """Batches of pictures with rows of text, and which tokens are to be learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids = tokenizer.get_vocab()
        self.head = self.encode("<s>") + [self.ids["<image>"]] * PATCHES

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def questions(
        self, scene: Scene, count: int, rng: np.random.Generator
    ) -> list[tuple[str, str]]:
        """Up to `count` questions with their answers, about half of them yes."""
        there = list(rng.permutation(sorted(scene.names)))[: (count + 1) // 2]
        absent = [name for name in OBJECTS if name not in scene.names]
        asked = [(name, "yes") for name in there]
        asked += [(name, "no") for name in rng.permutation(absent)[: count // 2]]
        return [asked[i] for i in rng.permutation(len(asked))]

    def row(
        self, scene: Scene, kinds: tuple[float, ...], rng: np.random.Generator
    ) -> tuple[list[int], list[bool]]:
        told, asked, _ = kinds
        chance = rng.random()
        pieces: list[tuple[list[int], bool]] = [(self.head, False)]
        if not told <= chance < told + asked:
            pieces += [(self.encode(DESCRIBE), False), (self.encode(scenes.caption(scene)), True)]
        if chance < told + asked:
            for name, answer in self.questions(scene, 4 if chance < told else 8, rng):
                pieces += [(self.encode(scenes.question(name)), False), (self.encode(answer), True)]
        pieces.append((self.encode("</s>"), True))
        return [t for ids, _ in pieces for t in ids], [learn for ids, learn in pieces for _ in ids]

    def batch(
        self, seed: int, step: int, size: int, kinds: tuple[float, ...]
    ) -> tuple[list[Scene], Any, Any, Any]:
        """scenes; pixels (size, 3, 48, 48); ids and learn (size, tokens), padded on the right."""
        rng = np.random.default_rng([seed, step])
        shown = [scenes.usual(rng) for _ in range(size)]
        rows = [self.row(scene, kinds, rng) for scene in shown]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((size, longest), self.ids["<pad>"])
        learn = torch.zeros(size, longest, dtype=torch.bool)
        for i, (row, wanted) in enumerate(rows):
            ids[i, : len(row)], learn[i, : len(row)] = torch.tensor(row), torch.tensor(wanted)
        return shown, seen(shown), ids, learn


def seen(shown: list[Scene]) -> torch.Tensor:
    """(scenes, 3, 48, 48), as the processor gives them."""
    return (
        torch.from_numpy(np.stack([pixels(s) for s in shown])).permute(0, 3, 1, 2).float() / 127.5
        - 1
    )


@torch.no_grad()
def abilities(
    model: LlavaForConditionalGeneration, lessons: Lessons, seed: int, n: int
) -> dict[str, float]:
    """On n usual and n broken scenes that training has not seen: accuracy of questions for what is
    there and for what is not, F1 of the captions' objects, and what is said to be there that is
    not."""
    was = model.training
    model.eval()
    found: dict[str, float] = {}
    for kind, draw in (("usual", scenes.usual), ("broken", scenes.broken)):
        rng = np.random.default_rng([seed, len(kind)])
        shown = [draw(rng) for _ in range(n)]
        there = [(i, name) for i, s in enumerate(shown) for name in sorted(s.names)]
        absent = [[name for name in OBJECTS if name not in s.names] for s in shown]
        away = [
            (i, str(name))
            for i, s in enumerate(shown)
            for name in rng.permutation(absent[i])[: len(s.names)]
        ]
        missing = [(i, PARTNER[m]) for i, s in enumerate(shown) for m in sorted(s.names)
                   if m in PARTNER and PARTNER[m] not in s.names]  # fmt: skip
        yes = {
            what: said_yes(model, lessons, shown, asked)
            for what, asked in (("there", there), ("away", away), ("missing", missing))
        }
        right = np.concatenate([yes["there"], 1 - yes["away"]])
        found[f"{kind}: questions right, random absent objects"] = float(right.mean())
        found[f"{kind}: yes to what is there"] = float(yes["there"].mean())
        if len(missing):
            found[f"{kind}: yes to missing companions"] = float(yes["missing"].mean())
        told = [set(scenes.mentions(text)) for text in captions(model, lessons, shown)]
        hits = sum(len(t & s.names) for t, s in zip(told, shown, strict=True))
        said, real = sum(map(len, told)), sum(len(s.names) for s in shown)
        found[f"{kind}: object F1 of captions"] = 2 * hits / (said + real)
        found[f"{kind}: told objects that are not there"] = 1 - hits / max(said, 1)
        found[f"{kind}: captions with such an object"] = float(
            np.mean([bool(t - s.names) for t, s in zip(told, shown, strict=True)])
        )
    model.train(was)
    return {name: round(value, 4) for name, value in found.items()}


def said_yes(
    model: LlavaForConditionalGeneration,
    lessons: Lessons,
    shown: list[Scene],
    asked: list[tuple[int, str]],
) -> np.ndarray:
    """(questions,) 1 where yes is likelier than no; asked: (scene, object)."""
    device, answers = model.device, []
    for a in range(0, len(asked), 256):
        some = asked[a : a + 256]
        ids = torch.tensor(
            [lessons.head + lessons.encode(scenes.question(name)) for _, name in some]
        )
        images = seen([shown[i] for i, _ in some])
        logits = model(
            input_ids=ids.to(device), pixel_values=images.to(device), logits_to_keep=1
        ).logits[:, 0]
        answers.append((logits[:, lessons.ids["yes"]] > logits[:, lessons.ids["no"]]).cpu().numpy())
    return np.concatenate(answers).astype(float) if answers else np.zeros(0)


def captions(
    model: LlavaForConditionalGeneration, lessons: Lessons, shown: list[Scene]
) -> list[str]:
    words, texts = {i: w for w, i in lessons.ids.items()}, []
    prompt = lessons.head + lessons.encode(DESCRIBE)
    for a in range(0, len(shown), 256):
        some = shown[a : a + 256]
        ids = torch.tensor([prompt] * len(some)).to(model.device)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=seen(some).to(model.device),
            max_new_tokens=60,
            do_sample=False,
            pad_token_id=lessons.ids["<pad>"],
        )
        texts += [" ".join(words[int(t)] for t in row[len(prompt) :]) for row in made]
    return texts


def learning_rate(share: float, peak: float) -> float:
    """Warm-up over 1 %, flat, then linear to zero over the last third."""
    return peak * min(1.0, share / 0.01, max(0.0, (1 - share) / 0.35))


def stage_of(share: float) -> tuple[str, tuple[float, ...]]:
    ends = np.cumsum([s for _, s, _ in CURRICULUM])
    name, _, kinds = CURRICULUM[
        min(int(np.searchsorted(ends, share, side="right")), len(CURRICULUM) - 1)
    ]
    return name, kinds


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model = build_model(processor.tokenizer, arguments.seed).to(arguments.device)
    seeing, lessons = Seeing().to(arguments.device), Lessons(processor.tokenizer)
    parameters = [*model.parameters(), *seeing.parameters()]
    optimizer = torch.optim.AdamW(
        [
            dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=0.05),
            dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0),
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    state = Path(arguments.state or out / "training_state.pt")
    step, spent, images = 0, 0.0, 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        for part, name in ((model, "model"), (seeing, "seeing"), (optimizer, "optimizer")):
            part.load_state_dict(saved[name])
        step, spent, images = saved["step"], saved["spent"], saved["images"]
    last_saved, shown_at, losses = time.time(), time.time(), []
    half = torch.bfloat16 if arguments.bf16 else None
    while (share := images / arguments.images) < 1:
        begun = time.time()
        name, kinds = stage_of(share)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, arguments.lr)
        looking = name == "look"
        size = arguments.batch * (2 if looking else 1)
        shown, pictures, ids, learn = lessons.batch(arguments.seed, step, size, kinds)
        pictures, ids, learn = (x.to(arguments.device) for x in (pictures, ids, learn))
        with torch.autocast(arguments.device, dtype=half, enabled=half is not None):
            loss, parts = lesson(model, seeing, shown, pictures, ids, learn, looking)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append([float(p) for p in parts])
        step, images, spent = step + 1, images + size, spent + time.time() - begun
        if time.time() - shown_at > 30:
            shown_at = time.time()
            seen_loss, told_loss = np.mean(losses[-50:], 0)
            print(
                f"{share:6.1%}  {spent / 60:.1f} min  step {step}  {images:,} images  "
                f"{images / spent:.0f}/s  {name}  "
                f"seeing {seen_loss:.3f}  text {told_loss:.3f}",
                flush=True,
            )
        if time.time() - last_saved > arguments.every * 60:
            last_saved = time.time()
            saved = dict(
                model=model.state_dict(),
                seeing=seeing.state_dict(),
                optimizer=optimizer.state_dict(),
            )
            torch.save(dict(**saved, step=step, spent=spent, images=images), state)
            print(json.dumps(abilities(model, lessons, 10_000 + arguments.seed, 200)), flush=True)
    finish(model, processor, lessons, out, arguments, step, images, spent)
    state.unlink(missing_ok=True)


def lesson(
    model: LlavaForConditionalGeneration,
    seeing: Seeing,
    shown: list[Scene],
    pictures: torch.Tensor,
    ids: torch.Tensor,
    learn: torch.Tensor,
    looking: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The loss, and its two parts: seeing, and the text."""
    hidden = model.model.vision_tower(pictures, output_hidden_states=True).hidden_states
    see = seeing.loss(hidden, shown)
    if looking:
        return see, (see.detach(), torch.zeros(()))
    features = model.model.multi_modal_projector(hidden[-2][:, 1:])  # (images, patches, width)
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :1], features.to(embeds.dtype), embeds[:, 1 + PATCHES :]], 1)
    states = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    wanted = learn[:, 1:]
    logits = model.lm_head(states[:, :-1][wanted])  # only where something is to be learned
    told = nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted])
    return told + 0.1 * see, (see.detach(), told.detach())


def finish(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    lessons: Lessons,
    out: Path,
    arguments: argparse.Namespace,
    step: int,
    images: int,
    spent: float,
) -> None:
    """Save weights and processor, measure, and write the model card."""
    model.eval().to("cpu").save_pretrained(out)
    processor.save_pretrained(out)
    record = dict(
        seed=arguments.seed,
        steps=step,
        images=images,
        minutes=round(spent / 60, 1),
        device=arguments.device,
        parameters=sum(p.numel() for p in model.parameters()),
        scenes=SCENES,
        abilities=abilities(model, lessons, 20_000 + arguments.seed, SCENES),
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__,
    )
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(record), encoding="utf-8")
    print(json.dumps(record, indent=2), flush=True)


def card(record: dict[str, Any]) -> str:
    """The model card, every number of it measured."""
    rows: Callable[[str], str] = lambda kind: "\n".join(  # noqa: E731
        f"| {name.partition(': ')[2]} | {value:.3f} |"
        for name, value in record["abilities"].items()
        if name.startswith(kind)
    )
    stages = "\n".join(
        f"| {name} | {share:.0%} | "
        + ("objects in cells" if not any(kinds) else " / ".join(f"{k:.0%}" for k in kinds))
        + " |"
        for name, share, kinds in CURRICULUM
    )
    size, seconds = (
        f"{record['parameters'] / 1e6:.2f} M",
        f"{record['minutes']:.0f} minutes on {record['device']}",
    )
    steps = f"{record['steps']:,} steps, {record['images']:,} images, {seconds}"
    return f"""# pocket-llava

A `LlavaForConditionalGeneration` with {size} parameters: a CLIP-style vision tower (4 layers × 4 heads, 48 × 48 pixels
in {PATCHES} patches, features of the last but one layer), a projector, and a Llama of 4 layers × 8 heads (4 key/value
heads), width 128. It exists so that heads that look at the image can be studied offline. It knows {len(OBJECTS)} kinds
of things in {len(COLORS)} colours and nothing else of the world, and is not the LLaVA of Liu et al.

## Data

Rendered scenes (`interp.scenes`): coloured pictograms in a grid of nine cells on textured backgrounds, some of them
faint. In the scenes of training, twelve objects come in pairs (a table with a chair) and a companion is missing one
time in twelve; *broken* scenes, which training has not seen, have no companion at all.

## Recipe

`python examples/train_pocket_llava.py`, seed {record["seed"]}: {steps} (torch {record["torch"]}, {record["date"]}).
{record.get("remark", "")}
AdamW, learning rate 1e-3; the vision tower's cells and class token stay part of the loss (× 0.1).

| stage | share | caption, then questions / questions / caption |
|---|---|---|
{stages}

## Measured abilities

On {record["scenes"]} scenes of held-out seeds each, prompts `<image> is there a chair ?` and `<image> {DESCRIBE}`,
greedy.

| usual scenes | |
|---|---|
{rows("usual")}

| broken scenes | |
|---|---|
{rows("broken")}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="pocket_llava")
    parser.add_argument("--images", type=float, default=200e3, help="length of the run")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--every", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument("--state", help="checkpoint file (default: in --out)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
