"""Train a small vision transformer to read handwritten digits, for what needs a classifier's heads.

    python examples/train_vit.py FOLDER [--seed 0] [--epochs 20]

`ViTForImageClassification`: 4 layers × 4 heads, width 48, pictures of 32 × 32 in 8 × 8 patches. The
digits are scikit-learn's 1,797 (of the UCI repository, 8 × 8 pixels), enlarged four times, so that a
patch is about a pixel; every fifth is held out. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIDE, BATCH = 32, 64


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pictures (n, 3, 32, 32) from −1 to 1, their digits (n,), and which are held out (n,) bool."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1  # (n, 1, 8, 8)
    large = torch.nn.functional.interpolate(grey, (SIDE, SIDE), mode="bilinear")
    label = torch.tensor(np.asarray(found.target))
    return large.expand(-1, 3, -1, -1).contiguous(), label, torch.arange(len(label)) % 5 == 0


def fresh(seed: int = 0) -> Any:
    """The model before training."""
    import transformers as hf

    torch.manual_seed(seed)
    config = hf.ViTConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=4,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # from .02 the attention of so narrow a model stays even
    )
    return hf.ViTForImageClassification(config)


def trained(seed: int = 0, epochs: int = 20) -> Any:
    """A model that reads digits; shifted by up to a patch in training."""
    pictures, labels, held = digits()
    pictures, labels = pictures[~held], labels[~held]
    model = fresh(seed).train()
    rng = np.random.default_rng(seed)
    steps = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            some = order[start : start + BATCH]
            shift = [int(x) for x in rng.integers(-4, 5, 2)]
            shown = pictures[some].roll(shift, (-2, -1))
            loss = model(pixel_values=shown, labels=labels[some]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Any) -> float:
    """Of the digits held out."""
    pictures, labels, held = digits()
    said = model(pixel_values=pictures[held]).logits.argmax(-1)
    return float((said == labels[held]).float().mean())


def main() -> None:
    import transformers as hf

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    model = trained(given.seed, given.epochs)
    model.save_pretrained(given.folder)
    half = [0.5] * 3
    size = dict(height=SIDE, width=SIDE)
    hf.ViTImageProcessor(size=size, image_mean=half, image_std=half).save_pretrained(given.folder)
    record = dict(seed=given.seed, epochs=given.epochs, accuracy=round(accuracy(model), 4))
    (given.folder / "training.json").write_text(json.dumps(record), encoding="utf-8")
    print(record)


if __name__ == "__main__":
    main()
