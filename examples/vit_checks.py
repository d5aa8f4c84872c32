"""Small measurements on the vision transformer of examples/train_vit.py that docs/methods.md
quotes, each beside its control: `python examples/vit_checks.py FOLDER [clusters] [patches]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from train_vit import accuracy, digits, fresh

import interp
from interp.edits import Temperature
from interp.vision import cluster_heads, cluster_stability, patch_damage


def held_out(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first pictures that the model was not trained on, and their digits."""
    pictures, labels, held = digits()
    return pictures[held][:n], labels[held][:n]


def clusters(model: Any, n: int = 320, k: int = 4) -> None:
    """Kinds of heads, over halves of the pictures, beside a model of random weights."""
    pictures, _ = held_out(n)
    prompts = [dict(pixel_values=some) for some in pictures.split(16)]
    frame = cluster_heads(model, prompts, k)
    patterns = torch.tensor(frame.attrs["patterns"])  # (heads, 16, 16)
    for c, mine in frame.groupby("cluster"):
        mean = patterns[mine.index.tolist()].mean(0)
        own, flat = float(mean.diagonal().mean()), float(mean.mean(0).max())
        names = [f"L{r.layer}H{r.head}" for r in mine.itertuples()]
        print(f"cluster {c}: own cell {own:.2f}, most looked-at cell {flat:.2f}", *names)
    for seed in (0, 1, 2):
        print("trained", seed, cluster_stability(model, prompts, k, seed).round(2).to_string())
        random = interp.load(fresh(seed).eval())
        print("random", seed, cluster_stability(random, prompts, k, seed).round(2).to_string())


def patches(model: Any, n: int = 160) -> None:
    """One damaged patch, untouched and with smoother or sharper attention."""
    pictures, labels = held_out(n)
    taus = (1.0, 0.5, 1.5, 2.0, 3.0)
    edits = [None if tau == 1 else Temperature(tau) for tau in taus]
    for tau, edit in zip(taus, edits, strict=True):
        with torch.no_grad(), model.edit(*([edit] if edit else [])):
            said = model(pixel_values=pictures).logits.argmax(-1)
        print(f"τ = {tau}: accuracy {float((said == labels).float().mean()):.3f}")
    found = patch_damage(model, pictures, labels, edits, level=2.0, steps=10)
    frame = found.frame.assign(tau=[taus[i] for i in found.frame["edit"]])
    print(frame.drop(columns="edit").round(3).to_string(index=False))
    for kind in ("noise", "adversarial"):
        mine = found.heads.query("kind == @kind and edit == 0").set_index("head")
        rise = (mine["after"] / mine["before"]).sort_values(ascending=False)
        print(kind, "attention after / before", rise.round(2).head(4).to_dict(), "median",
              round(float(rise.median()), 2))  # fmt: skip


CHECKS: dict[str, Callable[[Any], None]] = {"clusters": clusters, "patches": patches}


def main() -> None:
    folder, *names = sys.argv[1:]
    model = interp.load(folder)
    print(f"accuracy {accuracy(model.module):.3f}")
    for name in names or CHECKS:
        CHECKS[name](model)


if __name__ == "__main__":
    main()
