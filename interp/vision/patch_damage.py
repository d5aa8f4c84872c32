"""One damaged patch of a picture: how often a classifier changes its mind, and who looks there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError
from interp.inputs.text import check_seed
from interp.support.checked import number, whole_number
from interp.support.html import block
from interp.support.statistics import bootstrap
from interp.vision.patches import PatchGrid, patch_grid
from interp.vision.towers import picture_tower, sees_alone
from interp_hooks.edit import Edit
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels import Received

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.model import HookedModel

#: pictures that are run at once
BATCH = 64
KINDS = ("noise", "adversarial", "transferred")


@dataclass(frozen=True)
class PatchDamage:
    """What one damaged patch does.

    Attributes:
        frame: a row a kind of damage and edit: `kind`, `edit` (its number), `changed` (share of
            pictures whose class is another than under the same edit without damage) with its 95 %
            interval `low`, `high`, `elsewhere` (the same with the very patch put in another place),
            `accuracy` (NaN without labels), `before`, `after` (mean attention that the patch
            receives from a query, over heads, untouched and damaged) and `other` (what another
            patch receives of the damaged picture).
        heads: a row a kind, edit and head: `kind`, `edit`, `head`, `before`, `after`, `other`.

    Example:
        >>> from interp.vision.patch_damage import PatchDamage
        >>> [field for field in PatchDamage.__dataclass_fields__]
        ['frame', 'heads']
    """

    frame: pd.DataFrame
    heads: pd.DataFrame

    def _repr_html_(self) -> str:
        rows = [[str(r[0]), *(f"{x:.3g}" for x in r[1:])] for r in self.frame.to_numpy().tolist()]
        return block("Patch damage", "", headings=list(self.frame.columns), rows=rows)


def patch_damage(
    model: HookedModel,
    pictures: torch.Tensor,
    labels: torch.Tensor | None = None,
    edits: Sequence[Edit | None] = (None,),
    kinds: Sequence[str] = KINDS,
    level: float = 1.0,
    steps: int = 20,
    seed: int = 0,
) -> PatchDamage:
    """What damage to one patch of each picture does to a classifier, untouched and under edits.

    After Gu, Tresp and Qin, ECCV 2022, arXiv 2111.10659: one patch, at a place that the seed gives,

        noise          has Gaussian noise added, of `level` standard deviations of the pictures
        adversarial    x ← clip(x + r/10 · sign ∂ CE(class, f(x)) / ∂x), `steps` times, inside the
                       patch alone; r and the bounds are the range of the pictures, and f is the
                       model under the edit
        transferred    the adversarial patch of the first edit's model, under each edit

    Args:
        model: a classifier that reads pictures alone.
        pictures: (n, channels, height, width), as the model's image processor gives them.
        labels: (n,) right classes, for `accuracy`; damage is against the model's own answers.
        edits: under which it is done, None for the model as it is: `Temperature(2.0)` smooths
            attention, which the paper found to help.
        kinds: of damage.
        level: of the noise.
        steps: of the attack.
        seed: of places and noise.

    Raises:
        InputError: a model that is no classifier of pictures alone, or whose patches are no grid;
            pictures of another shape, a kind that there is not.

    Misleads:
        An attack on a smoothed model may fail because its gradients vanish, not because it is
        robust: `transferred` asks the same patch of all, and more steps belong beside it. A patch
        that draws attention need not be what changes the answer.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, image_size=16, patch_size=4)
        >>> vit = interp.load(ViTForImageClassification(config))
        >>> found = interp.vision.patch_damage(vit, torch.randn(4, 3, 16, 16), steps=1)
        >>> found.frame[["kind", "edit"]].to_numpy().tolist()
        [['noise', 0], ['adversarial', 0], ['transferred', 0]]
    """
    import pandas as pd

    check_seed(seed)
    level, steps = number(level, "The level of noise"), whole_number(steps, "steps")
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong or level < 0 or steps < 0:
        raise InputError(
            f"Patches are damaged by {', '.join(KINDS)}, at a level and for steps from 0 up"
            f"{f', not by {wrong[0]!r}' if wrong else ''}."
        )
    grid = _grid(model, pictures)
    rng = np.random.default_rng(seed)
    places = np.stack([rng.permutation(grid.patches)[:2] for _ in pictures])  # (n, 2)
    at = torch.tensor(places)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    noisy = pictures + level * float(pictures.std()) * noise
    heads = [h for h in model.heads if h.tower == picture_tower(model)]
    rows, by_head, first = [], [], None
    for which, edit in enumerate(edits):
        own = _Run(model, [] if edit is None else [edit], grid, at)
        clean, before = own.answers(pictures)
        for kind in kinds:
            if kind == "noise":
                shown = noisy
            elif kind == "adversarial" or first is None:
                shown = own.attacked(pictures, clean, steps)
                first = shown if first is None else first
            else:
                shown = first
            patched = own.with_patch(pictures, shown, at[:, 0], at[:, 0])
            said, after = own.answers(patched)
            moved, _ = own.answers(own.with_patch(pictures, shown, at[:, 0], at[:, 1]))
            flips = (said != clean).float().tolist()
            share = bootstrap(flips, seed)
            right = np.nan if labels is None else float((said == labels.cpu()).float().mean())
            values = dict(before=before[..., 0], after=after[..., 0], other=after[..., 1])
            row: dict[str, Any] = dict(
                kind=kind,
                edit=which,
                changed=share.mean,
                low=share.low,
                high=share.high,
                elsewhere=float((moved != clean).float().mean()),
                accuracy=right,
            )
            rows.append(row | {name: float(x.mean()) for name, x in values.items()})
            by_head += [
                dict(kind=kind, edit=which, head=str(h))
                | {name: float(x[:, i].mean()) for name, x in values.items()}
                for i, h in enumerate(heads)
            ]
    return PatchDamage(pd.DataFrame(rows), pd.DataFrame(by_head))


class _Run:
    """A model under an edit, and the two places of each picture that are asked about."""

    def __init__(
        self, model: HookedModel, edits: Sequence[Edit], grid: PatchGrid, at: torch.Tensor
    ) -> None:
        self.model, self.edits, self.grid, self.at = model, edits, grid, at

    def logits(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.model(pixel_values=pictures).logits)  # (n, classes)

    @torch.no_grad()
    def answers(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n,) classes, and (n, heads, 2): attention that the two places receive from a query on
        average."""
        tower = picture_tower(self.model)
        said, looks = [], []
        for some in self._batches(len(pictures)):
            keys = (self.at[some] + self.grid.first)[:, None]  # (n, 1, 2)
            layers: dict[int, torch.Tensor] = {}

            def note(stats: LayerStats, layers: dict[int, torch.Tensor] = layers) -> None:
                if stats.site.tower == tower and stats.site.kind == "self":
                    layers[stats.site.layer] = stats.received["here"].float().cpu()

            asked = Question(received={"here": Received(keys=keys)})
            with self.model.edit(*self.edits), self.model.watch(asked, note, "after"):
                said.append(self.logits(pictures[some]).argmax(-1).cpu())
            looks.append(torch.cat([layers[layer] for layer in sorted(layers)], 1))
        return torch.cat(said), torch.cat(looks)

    def attacked(self, pictures: torch.Tensor, against: torch.Tensor, steps: int) -> torch.Tensor:
        """The pictures after `steps` of the attack on their first places."""
        low, high = float(pictures.min()), float(pictures.max())
        done = []
        for some in self._batches(len(pictures)):
            own, target = pictures[some], against[some].to(self.model.device)
            inside = self._inside(own, self.at[some, 0])
            shown = own.clone()
            for _ in range(steps):
                asked = shown.clone().requires_grad_()
                with torch.enable_grad(), self.model.edit(*self.edits):
                    loss = torch.nn.functional.cross_entropy(
                        self.logits(asked), target, reduction="sum"
                    )
                    (slope,) = torch.autograd.grad(loss, asked)
                step = (shown + (high - low) / 10 * slope.to(shown).sign()).clamp(low, high)
                shown = torch.where(inside, step, own)
            done.append(shown)
        return torch.cat(done)

    def with_patch(
        self, pictures: torch.Tensor, shown: torch.Tensor, source: torch.Tensor, to: torch.Tensor
    ) -> torch.Tensor:
        """The pictures with the patch at `source` of `shown` put at `to`."""
        new = pictures.clone()
        for i, (a, b) in enumerate(zip(source.tolist(), to.tolist(), strict=True)):
            new[i][self._cut(pictures, b)] = shown[i][self._cut(pictures, a)]
        return new

    def _cut(self, pictures: torch.Tensor, place: int) -> tuple[slice, slice, slice]:
        """The pixels (channels, rows, columns) of a patch."""
        height = pictures.shape[-2] // self.grid.rows
        width = pictures.shape[-1] // self.grid.columns
        row, column = divmod(place, self.grid.columns)
        return (
            slice(None),
            slice(row * height, (row + 1) * height),
            slice(column * width, (column + 1) * width),
        )

    def _inside(self, pictures: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(n, channels, height, width) bool: the pixels of each picture's patch."""
        inside = torch.zeros(pictures.shape, dtype=torch.bool)
        for i, place in enumerate(places.tolist()):
            inside[i][self._cut(pictures, place)] = True
        return inside

    def _batches(self, n: int) -> Iterator[slice]:
        return (slice(i, i + BATCH) for i in range(0, n, BATCH))


def _grid(model: HookedModel, pictures: torch.Tensor) -> PatchGrid:
    """The grid of a classifier's patches. Raises `InputError` for what is none."""
    if not sees_alone(model):
        raise InputError(
            f"{model.name} does not read pictures alone, as a classifier of them does."
        )
    if not isinstance(pictures, torch.Tensor) or pictures.ndim != 4 or not len(pictures):
        raise InputError("Pictures are a tensor (n, channels, height, width) with one at least.")
    slots: list[int] = []
    with torch.no_grad(), model.watch(Question(call=True), lambda s: slots.append(s.call.n_keys)):  # type: ignore[union-attr]
        out = model(pixel_values=pictures[:1])
    logits = getattr(out, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f"{model.name} gives no classes of a picture.")
    size = (int(pictures.shape[-2]), int(pictures.shape[-1]))
    grid = patch_grid(model.module.config, slots[0], size)
    if grid is None or grid.patches < 2:
        raise InputError(f"The patches of {model.name} are no grid of known size.")
    return grid
