"""Train pocket-dit, a diffusion transformer that draws dots, from nothing: one file, no download.

    python examples/train_pocket_dit.py --out interp/models/pocket_dit

Pictures come from `interp.scenes.dots`: one to six dots of one colour, which is the class. The model
is diffusers' own `DiTTransformer2DModel` on pixels, trained by rectified flow (Liu et al. 2022, arXiv
2209.03003), its class left out one time in ten for classifier-free guidance. Interrupt and start
again with the same --out to resume.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from interp.scenes import DOT_COLORS, dots, draw_dots, read_dots
from interp.scenes.dots import SIDE

#: pictures that are drawn once, and come again in another order
PICTURES = 20_000
NULL = len(DOT_COLORS)  # the class that is none


def build_model(seed: int) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        num_layers=6,
        sample_size=SIDE,
        patch_size=3,
        num_embeds_ada_norm=NULL,
    ).eval()  # its own dropping of classes is another draw in each block


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """(pictures, 3, 24, 24) and their classes."""
    drawn = [dots(seed) for seed in range(PICTURES)]
    names = list(DOT_COLORS)
    pictures = torch.from_numpy(np.stack([draw_dots(d) for d in drawn]))
    return pictures, torch.tensor([names.index(d.color) for d in drawn])


@torch.no_grad()
def draw(
    model: DiTTransformer2DModel, labels: torch.Tensor, guidance: float, steps: int, seed: int
) -> torch.Tensor:
    """(pictures, 3, 24, 24): drawn by Euler's method under classifier-free guidance."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    x = torch.randn(len(labels), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NULL)])
    for t in scheduler.timesteps:
        v = model(x.repeat(2, 1, 1, 1), timestep=t.expand(len(both)), class_labels=both).sample
        own, none = v.chunk(2)
        x = scheduler.step(none + guidance * (own - none), t, x).prev_sample
    return x


def measure(model: DiTTransformer2DModel, count: int) -> dict[str, float]:
    """Of pictures drawn at guidance 1 and 3: of the right colour alone, of any dots, and how many."""
    names, found = list(DOT_COLORS), {}
    labels = torch.arange(count) % NULL
    for guidance in (1.0, 3.0):
        read = [read_dots(p.numpy()) for p in draw(model, labels, guidance, 25, 1)]
        right = [set(r.colors) - {None} == {names[c]} for r, c in zip(read, labels, strict=True)]
        found[f"one colour, the right one, guidance {guidance:g}"] = float(np.mean(right))
        found[f"dots a picture, guidance {guidance:g}"] = float(
            np.mean([len(r.cells) for r in read])
        )
    return found


def train(args: argparse.Namespace) -> None:
    model = build_model(args.seed)
    pictures, classes = data()
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
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
        average, done, spent = kept["average"], kept["done"], kept["spent"]
        print(f"resumed at step {done}")
    begun, losses = time.monotonic(), []
    for step in range(done, args.steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(pictures), (args.batch,), generator=generator)
        x, labels = pictures[chosen], classes[chosen]
        dropped = torch.rand(args.batch, generator=generator) < 0.1
        labels = labels.masked_fill(dropped, NULL)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.sigmoid(torch.randn(args.batch, generator=generator))  # the middle more often
        mixed = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise
        v = model(mixed, timestep=t * 1000, class_labels=labels).sample
        loss = (v - (noise - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(value, 0.002)
        if step % 100 == 0 or step == args.steps - 1:
            now = time.monotonic() - begun
            left = now / (step + 1 - done) * (args.steps - step - 1)
            recent = np.mean(losses[-100:])
            print(f"step {step}: {recent:.4f}, {(spent + now) / 60:.1f} min, {left / 60:.1f} left")
        if (step + 1) % args.every == 0:
            now = spent + time.monotonic() - begun
            kept = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), spent=now)
            kept |= dict(schedule=schedule.state_dict(), average=average, done=step + 1)
            torch.save(kept, state)
    spent += time.monotonic() - begun
    model.load_state_dict(average)
    found = measure(model, args.pictures)
    model.save_pretrained(args.out)
    record = dict(
        seed=args.seed,
        steps=args.steps,
        batch=args.batch,
        minutes=round(spent / 60, 1),
        device="cpu",
        parameters=sum(p.numel() for p in model.parameters()),
        pictures=args.pictures,
        abilities={k: round(v, 4) for k, v in found.items()},
        date=str(date.today()),
        torch=torch.__version__,
    )
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(card(record), encoding="utf-8")
    state.unlink(missing_ok=True)
    print(card(record))


def card(record: dict) -> str:
    rows = "\n".join(f"| {k} | {v:.3f} |" for k, v in record["abilities"].items())
    return f"""# pocket-dit

A `DiTTransformer2DModel` of diffusers with {record["parameters"] / 1e6:.2f} M parameters: 6 layers × 6 heads, width 96, patches of
3 × 3 pixels, pictures of 24 × 24. It draws dots of a given colour and nothing else; it exists so that heads of
diffusion transformers can be studied offline.

## Data

Pictures of one to six dots of one colour on a grid of nine cells (`interp.scenes.dots`); the class is the colour.

## Recipe

`python examples/train_pocket_dit.py`, seed {record["seed"]}: {record["steps"]:,} steps of {record["batch"]} pictures, rectified flow, class
left out one time in ten, average of weights (.998 a step); {record["minutes"]:.0f} minutes on {record["device"]} (torch {record["torch"]},
{record["date"]}).

## Measured abilities

{record["pictures"]} pictures, 25 steps of Euler's method, classes in turn. Training pictures have 3.5 dots.

| | |
|---|---|
{rows}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=240)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)
