"""Train smol-llava's eye: a vision tower and a projector for SmolLM2-135M-Instruct, which stays as
it is. Rendered scenes, one file, half an hour on two cores.

    interp models get smollm2-135m
    python examples/train_smol_llava.py --bf16 --out interp/models/smol_llava

Two stages. *Codes*: what would the language model like to see? Tokens that are sums of a few
learned vectors (object, colour, patch) stand for the picture, and only these vectors are learned,
through the frozen language model. *Distil*: the tower and the projector learn to make these tokens
from pixels; no language model. (A third, training both through the language model, is not needed
here, and is said to remove the sinks among the background's patches.)
A picture is read once; its caption and questions are segments after it that see the image and
themselves. Interrupt and start again with the same --state to resume.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smol_llava_card import SCENES, card, measured
from torch import nn

from interp import scenes
from interp.models import eyes
from interp.scenes import COLORS, OBJECTS, Scene
from interp.scenes.render import CELL, SIZE, pixels
from interp.scenes.words import DESCRIBE
from interp.scenes.world import COLUMNS, ROWS
from interp.vision.sinks import TAU, are_sinks, ratios, shared_dims, sink_dims

PATCH = 8
SIDE = SIZE // PATCH
PATCHES = SIDE**2
#: patches of each cell, and the cell of each patch
CELL_OF = [3 * (p // SIDE * PATCH // CELL) + p % SIDE * PATCH // CELL for p in range(PATCHES)]
QUESTIONS = 6

Batch = tuple[list[Scene], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Linear16(nn.Module):
    """A frozen linear map computed in bfloat16, twice as quick on CPUs that have it; the stream
    between such maps stays float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.bfloat16(), self.weight).float()


def halve(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Linear16(child))
        else:
            halve(child)


class Codes(nn.Module):
    """The tokens a picture would have if its things were named by vectors: O[object] + C[colour] +
    P[patch] where a thing is, N[patch] elsewhere. They start from the words' own embeddings."""

    def __init__(self, embed: Callable[[str], torch.Tensor], spread: float) -> None:
        super().__init__()
        rows, columns = (torch.stack([embed(w) for w in words]) for words in (ROWS, COLUMNS))
        place = torch.stack([0.25 * (rows[c // 3] + columns[c % 3]) for c in CELL_OF])
        self.object = nn.Parameter(torch.stack([embed(w) for w in OBJECTS]))
        self.color = nn.Parameter(torch.stack([0.5 * embed(w) for w in COLORS]))
        self.place = nn.Parameter(place + 0.1 * spread * torch.randn(place.shape))
        self.empty = nn.Parameter(0.1 * spread * torch.randn(place.shape))

    def forward(self, shown: list[Scene]) -> torch.Tensor:
        """(scenes, patches, width)"""
        names, colors = contents(shown)
        there = (names > 0)[..., None].to(self.object.device)
        thing = self.object[(names - 1).clamp_min(0)] + self.color[(colors - 1).clamp_min(0)]
        return torch.where(there, thing + self.place, self.empty)


def contents(shown: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """(scenes, patches) object and colour of each patch's cell, from 1; 0 where it is empty."""
    cells = torch.zeros(2, len(shown), 9, dtype=torch.int64)
    for i, scene in enumerate(shown):
        for thing in scene.things:
            cells[0, i, thing.cell] = 1 + OBJECTS.index(thing.name)
            cells[1, i, thing.cell] = 1 + list(COLORS).index(thing.color)
    return cells[0][:, CELL_OF], cells[1][:, CELL_OF]


class Lessons:
    """Rows of text about pictures, as segments after the image."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.end = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(" " + text, add_special_tokens=False)["input_ids"])

    def asked(self, scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Questions with their answers, about half of them yes."""
        there = list(rng.permutation(sorted(scene.names)))[: QUESTIONS // 2]
        absent = [name for name in OBJECTS if name not in scene.names]
        asked = [(name, "yes") for name in there]
        return asked + [(n, "no") for n in rng.permutation(absent)[: QUESTIONS - len(there)]]

    def segments(self, scene: Scene, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
        """(what is read, what is to be said) of each segment."""
        parts = [(self.encode(DESCRIBE), [*self.encode(scenes.caption(scene)), self.end])]
        for name, answer in self.asked(scene, rng):
            parts.append((self.encode(scenes.question(name)), [*self.encode(answer), self.end]))
        return parts

    def batch(self, stage: int, step: int, size: int) -> Batch:
        """scenes; ids, labels, positions (size, tokens) of the text; mask (size, 1, tokens + image,
        tokens + image) of what each token sees."""
        rng = np.random.default_rng([self.seed, stage, step])
        shown = [scenes.usual(rng) for _ in range(size)]
        rows = [self.segments(scene, rng) for scene in shown]
        longest = max(sum(len(a) + len(b) for a, b in row) for row in rows)
        head = 1 + PATCHES
        ids = torch.full((size, longest), self.end)
        labels = torch.full((size, longest), -100)
        positions = torch.zeros(size, longest, dtype=torch.int64)
        sees = torch.zeros(size, head + longest, head + longest, dtype=torch.bool)
        sees[:, :head, :head] = torch.ones(head, head, dtype=torch.bool).tril()
        sees[:, head:, 0] = True  # padding sees the first token, lest its softmax be empty
        for i, row in enumerate(rows):
            at = 0
            for read, said in row:
                n = len(read) + len(said)
                ids[i, at : at + n] = torch.tensor(read + said)
                labels[i, at + len(read) - 1 : at + n - 1] = torch.tensor(said)
                positions[i, at : at + n] = head + torch.arange(n)
                a = head + at
                sees[i, a : a + n, :head] = True
                sees[i, a : a + n, a : a + n] = torch.ones(n, n, dtype=torch.bool).tril()
                at += n
        return shown, ids, labels, positions, sees[:, None]


class Trainer:
    """The frozen language model, what is learned, and the losses of the two stages."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.device = arguments.device
        self.model, self.processor = eyes.new()
        self.model.requires_grad_(False).eval().to(self.device)
        self.text = self.model.model.language_model
        if arguments.bf16:
            halve(self.text)
        self.embedding = self.model.get_input_embeddings().weight.detach()
        head = self.embedding.T.contiguous()
        self.head = head.bfloat16() if arguments.bf16 else head
        self.lessons = Lessons(self.processor.tokenizer, arguments.seed)
        self.spread = float(self.embedding.std())
        self.codes = Codes(self._embed, self.spread).to(self.device)
        self.tower = self.model.model.vision_tower
        self.projector = self.model.model.multi_modal_projector
        self.whole = nn.Linear(self.tower.config.hidden_size, len(OBJECTS)).to(self.device)

    def _embed(self, word: str) -> torch.Tensor:
        return self.embedding[self.lessons.encode(word)].mean(0)

    def image_tokens(self, shown: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """(scenes, patches, width) by the eye, and the objects by the class token, logits."""
        hidden = self.tower(seen(shown).to(self.device), output_hidden_states=True).hidden_states
        return self.projector(hidden[-2][:, 1:]), self.whole(hidden[-1][:, 0])

    def told(self, image: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Cross-entropy of captions and answers, a mean over tokens."""
        _, ids, labels, positions, sees = (
            b.to(self.device) if isinstance(b, torch.Tensor) else b for b in batch
        )
        n = len(ids)
        start = self.embedding[1].expand(n, 1, -1)  # <|im_start|>
        embeds = torch.cat([start, image, self.embedding[ids]], 1)
        first = torch.arange(1 + PATCHES, device=self.device).expand(n, -1)
        bias = torch.zeros(sees.shape, device=self.device).masked_fill(~sees, -1e9)
        states = self.text(
            inputs_embeds=embeds,
            attention_mask=bias,
            position_ids=torch.cat([first, positions], 1),
            use_cache=False,
        ).last_hidden_state[:, 1 + PATCHES :]
        wanted = labels >= 0
        logits = (states[wanted].to(self.head.dtype) @ self.head).float()
        return nn.functional.cross_entropy(logits, labels[wanted])

    def code_loss(self, step: int, size: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = self.lessons.batch(0, step, size)
        loss = self.told(self.codes(batch[0]), batch)
        return loss, dict(text=float(loss.detach()))

    def distil_loss(self, step: int, size: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([self.lessons.seed, 1, step])
        shown = [scenes.usual(rng) for _ in range(size)]
        image, whole = self.image_tokens(shown)
        with torch.no_grad():
            target = self.codes(shown)
        apart = (image - target).square().mean() / target.var()
        objects = nn.functional.binary_cross_entropy_with_logits(whole, self.there(shown))
        return apart + 0.1 * objects, dict(
            apart=float(apart.detach()), whole=float(objects.detach())
        )

    def there(self, shown: list[Scene]) -> torch.Tensor:
        """(scenes, objects) 1 where the scene has the object."""
        rows = [[float(name in scene.names) for name in OBJECTS] for scene in shown]
        return torch.tensor(rows, device=self.device)


def seen(shown: list[Scene]) -> torch.Tensor:
    """(scenes, 3, 48, 48) in −1 … 1, as the processor gives them."""
    stacked = np.stack([pixels(s) for s in shown])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Stage:
    name: str
    images: int
    batch: int
    learned: list[dict[str, Any]]
    loss: Callable[[int, int], tuple[torch.Tensor, dict[str, float]]]


def stages(trainer: Trainer, arguments: argparse.Namespace) -> list[Stage]:
    codes, tower = list(trainer.codes.parameters()), list(trainer.tower.parameters())
    bridge = [*trainer.projector.parameters(), *trainer.whole.parameters()]
    return [
        Stage("codes", arguments.codes, 8, [dict(params=codes, peak=0.1 * trainer.spread)],
              trainer.code_loss),
        Stage("distil", arguments.distil, 64,
              [dict(params=tower, peak=1e-3), dict(params=bridge, peak=1e-3)],
              trainer.distil_loss),
    ]  # fmt: skip


def learning_rate(share: float) -> float:
    """Warm-up over 1 %, flat, then linear to zero over the last 35 %."""
    return min(1.0, share / 0.01 + 0.02, max(0.0, (1 - share) / 0.35))


@torch.no_grad()
def abilities(trainer: Trainer, n: int, coded: bool, seed: int = 90_000) -> dict[str, float]:
    """On n usual and n broken scenes of a seed that no training saw: questions right, F1 of the
    captions' objects, CHAIR_I; and the pictures with a visual sink, of the usual ones."""
    measured: dict[str, float] = {}
    for kind, draw in (("usual", scenes.usual), ("broken", scenes.broken)):
        rng = np.random.default_rng([seed, len(kind)])
        shown = [draw(rng) for _ in range(n)]
        image = torch.cat(
            [
                trainer.codes(part) if coded else trainer.image_tokens(part)[0]
                for part in (shown[a : a + 50] for a in range(0, n, 50))
            ]
        )
        right = []
        for yes, absent in ((True, False), (False, True)):
            names = [
                sorted(set(OBJECTS) - s.names if absent else s.names)[i % len(s.names)]
                for i, s in enumerate(shown)
            ]
            logits = _asked(trainer, image, names)
            right += (logits == yes).tolist()
        measured[f"{kind}: questions"] = float(np.mean(right))
        told = _captions(trainer, image)
        hits = sum(len(set(t) & s.names) for t, s in zip(told, shown, strict=True))
        said, real = sum(map(len, told)), sum(len(s.names) for s in shown)
        measured[f"{kind}: F1"] = 2 * hits / max(1, said + real)
        measured[f"{kind}: CHAIR_I"] = 1 - hits / max(said, 1)
        if kind == "usual":
            measured["pictures with a visual sink"] = _with_sinks(trainer, image)
    return {name: round(value, 3) for name, value in measured.items()}


def _prompted(trainer: Trainer, image: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """(pictures, tokens, width) of prompts of one length."""
    ids = torch.tensor([trainer.lessons.encode(text) for text in texts], device=image.device)
    start = trainer.embedding[1].expand(len(ids), 1, -1)
    return torch.cat([start, image, trainer.embedding[ids]], 1)


def _asked(trainer: Trainer, image: torch.Tensor, names: list[str]) -> torch.Tensor:
    """(pictures,) bool: yes likelier than no."""
    embeds = _prompted(trainer, image, [scenes.question(name) for name in names])
    last = trainer.text(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
    words = trainer.embedding[[trainer.lessons.encode(w)[0] for w in ("yes", "no")]]
    logits = last @ words.T
    return logits[:, 0] > logits[:, 1]


def _captions(trainer: Trainer, image: torch.Tensor) -> list[list[str]]:
    """The objects that each picture's greedy caption names."""
    embeds = _prompted(trainer, image, [DESCRIBE] * len(image))
    said = trainer.model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
        max_new_tokens=48,
        do_sample=False,
        eos_token_id=trainer.lessons.end,
        pad_token_id=trainer.lessons.end,
    )
    texts = trainer.lessons.tokenizer.batch_decode(said, skip_special_tokens=True)
    return [scenes.mentions(text) for text in texts]


def _with_sinks(trainer: Trainer, image: torch.Tensor) -> float:
    """The share of pictures of which a patch is a sink at the published τ in some layer."""
    embeds = _prompted(trainer, image, [DESCRIBE] * len(image))
    streams = trainer.text(
        inputs_embeds=embeds, output_hidden_states=True, use_cache=False
    ).hidden_states[2:-1]
    patch = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=image.device)
    patch[:, 1 : 1 + PATCHES] = True
    found = torch.zeros(len(image), dtype=torch.bool, device=image.device)
    for stream in streams:
        size = ratios(stream)
        first = torch.zeros(len(image), dtype=torch.int64)
        dims = sink_dims(size, first, TAU) & ~shared_dims(size, TAU, image=patch)
        found |= (are_sinks(size, dims, TAU) & patch).any(1)
    return float(found.float().mean())


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    trainer, state = Trainer(arguments), Path(arguments.state)
    parts = dict(codes=trainer.codes, tower=trainer.tower, projector=trainer.projector,
                 whole=trainer.whole)  # fmt: skip
    at: dict[str, Any] = dict(stage=0, step=0, images=0, curve=[], minutes={})
    saved = torch.load(state, weights_only=True) if state.exists() else None
    if saved:
        at = saved["at"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    plan = stages(trainer, arguments)
    while at["stage"] < len(plan):
        stage = plan[at["stage"]]
        optimizer = torch.optim.Adam(stage.learned, betas=(0.9, 0.98))
        if saved and at["step"]:
            optimizer.load_state_dict(saved["optimizer"])
        saved = None
        _stage(trainer, stage, optimizer, at, parts, state, arguments.every)
        at.update(stage=at["stage"] + 1, step=0, images=0)
        _save(state, parts, None, at)
    finish(trainer, arguments, at)


def _save(state: Path, parts: dict[str, nn.Module], optimizer: Any, at: dict[str, Any]) -> None:
    """Under its name once it is whole."""
    kept = {name: part.state_dict() for name, part in parts.items()}
    beside = state.with_suffix(".new")
    torch.save(dict(kept, optimizer=optimizer and optimizer.state_dict(), at=at), beside)
    beside.replace(state)


def _stage(
    trainer: Trainer,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    at: dict[str, Any],
    parts: dict[str, nn.Module],
    state: Path,
    every: float,
) -> None:
    learned = [p for group in stage.learned for p in group["params"]]
    for p in learned:
        p.requires_grad_(True)
    kept_at = told_at = time.time()
    spent, losses = at["minutes"].get(stage.name, 0.0), []
    while at["images"] < stage.images:
        begun = time.time()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(at["images"] / stage.images)
        loss, terms = stage.loss(at["step"], stage.batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(terms)
        at["step"], at["images"] = at["step"] + 1, at["images"] + stage.batch
        spent += (time.time() - begun) / 60
        at["minutes"][stage.name] = spent
        done = at["images"] >= stage.images
        if time.time() - told_at > 30 or done:
            told_at = time.time()
            means = {k: round(float(np.mean([t[k] for t in losses[-50:]])), 4) for k in terms}
            left = spent / at["images"] * (stage.images - at["images"])
            print(f"{stage.name} {at['images']:,} of {stage.images:,} images, {spent:.1f} min, "
                  f"{left:.0f} left, {means}", flush=True)  # fmt: skip
            at["curve"].append([stage.name, at["images"], means])
        if time.time() - kept_at > every * 60 or done:
            kept_at = time.time()
            _save(state, parts, optimizer, at)
            can = abilities(trainer, 100, coded=stage.name == "codes")
            at["curve"].append([stage.name, at["images"], can])
            print(json.dumps(can), flush=True)
    for p in learned:
        p.requires_grad_(False)


def finish(trainer: Trainer, arguments: argparse.Namespace, at: dict[str, Any]) -> None:
    """Save the eye, measure the model it makes, in float32, and write the model card."""
    out = Path(arguments.out)
    eyes.save(trainer.model, out)
    record = dict(
        seed=arguments.seed,
        stages={s.name: s.images for s in stages(trainer, arguments)},
        minutes={name: round(m, 1) for name, m in at["minutes"].items()},
        bf16=arguments.bf16,
        device=arguments.device,
        parameters=sum(w.numel() for w in eyes.eye_of(trainer.model).values()),
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__,
        scenes=SCENES,
        abilities=measured(out),
        curve=at["curve"],
    )
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(record), encoding="utf-8")
    print(card(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="smol_llava")
    parser.add_argument("--state", default="smol_llava.pt", help="checkpoint file")
    parser.add_argument("--codes", type=int, default=4_000, help="pictures of the first stage")
    parser.add_argument("--distil", type=int, default=100_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="the frozen maps in bfloat16")
    parser.add_argument("--every", type=float, default=5, help="minutes between checkpoints")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
