"""Kinds of attention pattern in the vision tower: a small autoencoder's codes of every head,
clustered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from interp.errors import InputError
from interp.vision.patches import patch_grid, picture_size
from interp.vision.prompts import needs_images
from interp.vision.towers import picture_tower, see, sees_alone
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.model import HookedModel

#: Cells a side into which the picture is divided; 4 × 4 are as many groups as one observation
#: holds.
SIDE = 4
CODE, HIDDEN = 4, 32
#: Of the training's noise, in standard deviations of the patterns.
NOISE = 0.5
#: Of k-means, more than dozens of points need.
ITERATIONS = 100


def cluster_heads(
    model: HookedModel,
    prompts: Sequence[Mapping[str, Any]] | None = None,
    clusters: int = 4,
    seed: int = 0,
    samples: int = 8,
    steps: int = 300,
) -> pd.DataFrame:
    """Clusters of the vision tower's heads by their attention patterns.

    A head's pattern is how patches in each of 4 × 4 cells of the picture share their attention
    among the 16 cells (the class token left out, rows normalised), mean over pictures. A denoising
    autoencoder (256 → 32 → 4 → 32 → 256, tanh, on the square roots of the shares) learns all heads'
    patterns; k-means on its codes gives the clusters. Detail below a cell is lost; and with a few
    dozen heads the codes describe these heads and no others.

    Args:
        model: a vision-language model, or one that reads pictures alone.
        prompts: inputs with images, as `interp.vision.with_images` or the model's image processor
            makes them; None for `samples` rendered scenes.
        clusters: how many.
        seed: of weights, starts and scenes; the same seed gives the same table.
        samples: scenes, where no prompts are given.
        steps: of training.

    Returns:
        A row a head: tower, layer, head, cluster (0 is the largest), code_0 … code_3, and error,
        the mean absolute error of the head's reconstructed shares. `frame.attrs["patterns"]`:
        nested lists (heads, 16, 16), the shares.

    Raises:
        InputError: a model that takes no images, or whose patches are no grid; more clusters than
            heads.

    Example:
        >>> frame = interp.vision.cluster_heads(interp.load("llava"), samples=2, steps=20)
        >>> sorted(set(frame["cluster"]))
        [0, 1, 2, 3]
    """
    import pandas as pd

    from interp.vision.pictures import Pictures

    if not sees_alone(model):
        needs_images(model, "Clustering a vision tower's heads")
    inputs = Pictures(samples, seed).inputs(model) if prompts is None else list(prompts)
    heads = [h for h in model.heads if h.tower == picture_tower(model)]
    if not inputs or not 1 <= clusters <= len(heads):
        raise InputError(
            f"Clustering needs a prompt with an image and 1 to {len(heads)} clusters, the number "
            "of heads; there are "
            f"{len(inputs)} prompts and {clusters} clusters."
        )
    patterns = mean_patterns(model, inputs)
    flat = torch.stack([patterns[h.layer][h.head] for h in heads]).flatten(1)  # (heads, 256)
    codes, outputs = autoencode(flat.sqrt(), seed, steps)
    label = kmeans(codes.double().numpy(), clusters, seed)
    rows = [
        dict(tower=h.tower, layer=h.layer, head=h.head, cluster=int(c))
        for h, c in zip(heads, label, strict=True)
    ]
    frame = pd.DataFrame(rows)
    for i, column in enumerate(codes.T.tolist()):
        frame[f"code_{i}"] = column
    frame["error"] = (outputs.clamp_min(0).square() - flat).abs().mean(1).tolist()
    frame.attrs["patterns"] = flat.view(len(heads), SIDE**2, SIDE**2).tolist()
    return frame


@torch.no_grad()
def mean_patterns(
    model: HookedModel, prompts: Sequence[Mapping[str, Any]]
) -> dict[int, torch.Tensor]:
    """layer → (heads, cells, cells): share of the attention of patches in a cell that goes to each
    cell; rows sum to 1.

    From masses on 16 groups of keys a query; no patches × patches matrix.
    """
    from interp_kernels import Request, attention

    total: dict[int, torch.Tensor] = {}
    tower, size = picture_tower(model), None

    def note(stats: LayerStats) -> None:
        if stats.site.tower != tower or stats.site.kind != "self":
            return
        call = stats.call
        assert call is not None and call.query is not None and call.key is not None
        grid = patch_grid(model.module.config, call.n_keys, size)
        if grid is None or min(grid.rows, grid.columns) < SIDE:
            raise InputError(
                f"The patches of {model.name} are no grid of known size with {SIDE} or more a "
                "side, so their patterns "
                "can't be compared."
            )
        cells = grid.cells(SIDE).to(call.query.device)  # (slots,)
        request = Request(
            frozenset({"group_mass"}), cells.expand(call.batch, -1), SIDE**2, out=False
        )
        result = attention(
            call.query,
            call.key,
            call.value,
            **call.settings,
            request=request,
            backend="streaming",
        )
        mass = result.stats["group_mass"][:, :, grid.first :]  # (pictures, heads, patches, cells)
        own = nn.functional.one_hot(cells[grid.first :], SIDE**2).to(mass)  # (patches, cells)
        pooled = torch.einsum("bhqk,qc->hck", mass, own)
        pooled = pooled / pooled.sum(-1, keepdim=True).clamp_min(1e-30)
        total[stats.site.layer] = total.get(stats.site.layer, torch.zeros(())) + pooled.cpu()

    for inputs in prompts:
        size = picture_size(inputs) if sees_alone(model) else None
        with model.watch(Question(call=True), note):
            see(model, inputs)
    return {layer: mean / len(prompts) for layer, mean in total.items()}


def autoencode(shares: torch.Tensor, seed: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (heads, 4), reconstruction (heads, n)) of `shares` (heads, n) after `steps` of Adam on
    all heads. Noise on what it reads keeps it from learning the few heads by heart, so that like
    patterns get like codes."""
    width = shares.shape[1]
    mean = shares.mean(0)
    centred = shares - mean
    centred = centred / (scale := centred.std().clamp_min(1e-6))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        encode = nn.Sequential(nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CODE))
        decode = nn.Sequential(nn.Linear(CODE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, width))
        optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=1e-2)
        for _ in range(steps):
            noisy = centred + NOISE * torch.randn_like(centred)
            loss = (decode(encode(noisy)) - centred).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    codes = encode(centred).detach()
    return codes, decode(codes).detach() * scale + mean


def kmeans(points: np.ndarray, clusters: int, seed: int, starts: int = 10) -> np.ndarray:
    """(points,) int labels of the best of `starts` runs from k-means++ seeds; 0 is the largest
    cluster (the first point decides between equals)."""
    from scipy.cluster.vq import kmeans2, vq

    rng = np.random.default_rng(seed)
    clusters = min(clusters, len(np.unique(points, axis=0)))  # k-means++ needs as many to choose
    best, label = np.inf, np.zeros(len(points), int)
    for _ in range(starts):
        with warnings.catch_warnings():  # of a cluster that ends empty
            warnings.simplefilter("ignore", UserWarning)
            centres, _ = kmeans2(points, clusters, iter=ITERATIONS, minit="++", seed=rng)
        near, distance = vq(points, centres)
        if (cost := (distance**2).sum()) < best - 1e-12:
            best, label = cost, near
    order = sorted(
        set(label.tolist()), key=lambda c: (-(label == c).sum(), label.tolist().index(c))
    )
    return np.array([order.index(c) for c in label.tolist()])
