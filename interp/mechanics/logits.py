"""Direct logit attribution: what each head, MLP and bias writes towards an answer, past all later
layers.

The final residual stream is a sum of parts, x = Σ_c x_c: the embedding, every head's result z_h
W_O, the attention's biases and the MLPs. With the scale of the final norm frozen at x, logits are
linear in the stream, so the logit in a direction u is Σ_c u · norm_x(x_c) + u · bias: exact, not an
approximation (Elhage et al. 2021; Wang et al. 2022, section 3.1). Where a norm stands on the
attention's branch (Gemma 2, OLMo 2) it is frozen in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.evaluation.accuracy import sample
from interp.inputs.forward import forward
from interp.inputs.text import check_seed
from interp.mechanics.metric import Judged, judged
from interp.mechanics.weights import head_rows, main_sites
from interp.streams.writers import back, frozen_end, written
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    import pandas as pd

    from interp.tasks.task import Instance, Task
    from interp_hooks import HookedModel
    from interp_hooks.call import Site
    from interp_hooks.norms import Norms
    from interp_hooks.vocabulary import Vocabulary

#: instances run together
BATCH = 16


@dataclass(frozen=True)
class Direct:
    """Contributions to one direction at n judged positions, float64; they sum to `total`.

    `embedding` (n,): token and learned position; `heads` layer → (n, heads); `attention_bias` layer
    → (n,), b_O; `mlp` layer → (n,), all that a block adds besides its attention; `bias` (n,), the
    final norm's.
    """

    embedding: torch.Tensor
    heads: dict[int, torch.Tensor]
    attention_bias: dict[int, torch.Tensor]
    mlp: dict[int, torch.Tensor]
    bias: torch.Tensor
    total: torch.Tensor = field(repr=False)

    def sum(self) -> torch.Tensor:
        """(n,): all contributions together."""
        parts = [self.embedding, self.bias, *(h.sum(-1) for h in self.heads.values())]
        return torch.stack([*parts, *self.attention_bias.values(), *self.mlp.values()]).sum(0)


@torch.no_grad()
def direct(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    directions: torch.Tensor,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> Direct:
    """Direct contributions of heads, MLPs and embedding to given directions at given positions.

    For a logit the direction is a column of `model.vocabulary().W_U` (times its `logit_scale`).

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        input_ids, attention_mask: (batch, tokens).
        directions: (n, d_model), vectors that the final norm's output is multiplied with.
        rows, columns: the n positions (`rows`[i], `columns`[i]); by default the last of each row.

    Returns:
        A `Direct`: the parts, which sum to `total`.

    Raises:
        TapError: weights or norms are not known, or the parts do not add up to the stream: blocks
            scale or gate their branches (Granite), or layers without attention stand between.
        InputError: shapes that do not fit.

    Example:
        >>> ids = torch.arange(8)[None]
        >>> direction = model.vocabulary().W_U[:, 5][None]
        >>> found = interp.mechanics.direct(model, ids, None, direction)
        >>> bool((found.total - model.logits(ids)[0, -1, 5]).abs() < 1e-3), found.heads[2].shape
        (True, torch.Size([1, 8]))
    """
    from interp.loading import load

    hooked = load(model)
    return _direct(hooked, hooked.norms(), input_ids, attention_mask, [directions], rows, columns)[
        0
    ]


def direct_logits(model: Any, task: str | Task = "ioi", n: int = 32, seed: int = 0) -> pd.DataFrame:
    """Direct logit attribution of a task: what each head adds to right minus wrong, with errors.

    Direct contributions to (best answer logit − mean wrong logit) at the judged positions of `n`
    problems, before a softcap of the logits. Where a task names no wrong tokens the vocabulary's
    mean stands for them.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task: a name, or a task with settings of its own.
        n: problems.
        seed: of the problems.

    Returns:
        A row a part: the columns an atlas begins with, `component` ("embedding", "head",
        "attention_bias", "mlp", "bias"), `direct` (mean over problems, in logits; several judged
        positions of a problem are averaged first) and `direct_stderr`; `direct_right` and
        `direct_wrong`, the contributions to either logit over the mean of the whole vocabulary,
        whose difference `direct` is: a head can help by raising the one or by lowering the other.
        `layer` and `head` are −1 where a part has none. `attrs`: `metric`, the mean of what was
        attributed, equal to the sum of `direct`.

    Raises:
        UnknownNameError, InputError, ContextError: the task.
        TapError: as `direct`.

    Example:
        >>> frame = interp.mechanics.direct_logits(model, "ioi", n=4)
        >>> bool(abs(frame["direct"].sum() - frame.attrs["metric"]) < 1e-3)
        True
    """
    import pandas as pd

    from interp.loading import load

    check_seed(seed)
    hooked = load(model)
    vocabulary, norms = hooked.vocabulary(), hooked.norms()
    posed, instances = sample(hooked, task, n, seed)
    chosen = posed.task
    parts: dict[tuple[str, int], list[torch.Tensor]] = {}
    right: dict[tuple[str, int], list[torch.Tensor]] = {}
    totals: list[torch.Tensor] = []
    for group in _groups(instances):
        batch = judged(hooked, group)
        where = batch.input_ids, batch.attention_mask
        if any(len(right) > 1 for right in batch.right):  # the metric takes the best of them
            logits = logits_of(forward(hooked, *where))
            batch = batch.best(logits[batch.rows, batch.columns])
        directions = [_directions(batch, vocabulary, against) for against in (True, False)]
        both = _direct(
            hooked, norms, *where, [vectors for vectors, _ in directions], batch.rows, batch.columns
        )
        for contribution, (_, offset), into in zip(both, directions, (parts, right), strict=True):
            for key, values in _parts(contribution, offset).items():
                into.setdefault(key, []).append(_by_problem(values, batch))
        totals.append(_by_problem(both[0].total + directions[0][1], batch))
    rows = head_rows(hooked).assign(component="head")
    blank = dict(tower=hooked.main_tower, kind="self", head=-1, kv_head=-1)
    others = [dict(blank, layer=layer, component=name) for name, layer in parts if name != "head"]
    frame = pd.concat([rows, pd.DataFrame(others)], ignore_index=True)
    table, raised = _table(hooked, parts), _table(hooked, right)
    frame["direct"] = table.mean(0).tolist()
    frame["direct_stderr"] = (
        (table.std(0) / len(table) ** 0.5).tolist() if len(table) > 1 else float("nan")
    )
    frame["direct_right"] = raised.mean(0).tolist()
    frame["direct_wrong"] = (raised - table).mean(0).tolist()
    frame.attrs.update(metric=float(torch.cat(totals).mean()), task=chosen.name, n=n, seed=seed)
    return frame


def _groups(instances: Sequence[Instance]) -> list[Sequence[Instance]]:
    return [instances[i : i + BATCH] for i in range(0, len(instances), BATCH)]


def _table(model: HookedModel, parts: dict[tuple[str, int], list[torch.Tensor]]) -> torch.Tensor:
    """(problems, parts): heads first, then the others in order."""
    columns = [torch.cat(parts["head", s.layer]) for s in main_sites(model)]
    columns += [torch.cat(values) for (name, _), values in parts.items() if name != "head"]
    return torch.cat([c if c.ndim == 2 else c[:, None] for c in columns], 1)


def _directions(
    batch: Judged, vocabulary: Vocabulary, against: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, d_model) and (n,) float64: the metric of a judged position is direction · final + offset.
    `against`: the right tokens against the wrong ones, else against the whole vocabulary."""
    W_U = vocabulary.W_U
    everything = W_U.mean(1, dtype=torch.float64)
    vectors, offsets = [], []
    for right, named in zip(batch.right, batch.wrong, strict=True):
        wrong = named if against else ()
        rival = W_U[:, list(wrong)].double().mean(1) if wrong else everything
        vectors.append(vocabulary.logit_scale * (W_U[:, list(right)].double().mean(1) - rival))
        b = vocabulary.b_U
        offset = W_U.new_zeros((), dtype=torch.float64)
        if b is not None:
            offset = (
                b[list(right)].double().mean() - (b[list(wrong)] if wrong else b).double().mean()
            )
        offsets.append(offset)
    return torch.stack(vectors), torch.stack(offsets)


def _parts(found: Direct, offset: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """(component, layer) → (n,) or, for heads, (n, heads)."""
    parts = {("embedding", -1): found.embedding}
    parts |= {("head", layer): values for layer, values in found.heads.items()}
    parts |= {("attention_bias", layer): values for layer, values in found.attention_bias.items()}
    parts |= {("mlp", layer): values for layer, values in found.mlp.items()}
    return parts | {("bias", -1): found.bias + offset}


def _by_problem(values: torch.Tensor, batch: Judged) -> torch.Tensor:
    """(problems, …): the mean over each problem's judged positions of `values` (n, …)."""
    count = len(batch.input_ids)
    return torch.stack([values[batch.rows == row].mean(0) for row in range(count)]).cpu()


@torch.no_grad()
def _direct(
    model: HookedModel,
    norms: Norms,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    directions: Sequence[torch.Tensor],
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
) -> list[Direct]:
    """One for each of the `directions` (n, d_model), all from one forward."""
    batch, width = input_ids.shape
    if (rows is None) != (columns is None):
        raise InputError("Give both rows= and columns= of the judged positions, or neither.")
    if rows is None or columns is None:
        rows, columns = torch.arange(batch), torch.full((batch,), width - 1)
    for one in directions:
        if one.ndim != 2 or not len(one) == len(rows) == len(columns):
            raise InputError(
                f"directions is (judged positions, d_model): {tuple(one.shape)} does not fit "
                f"{len(rows)} positions."
            )
    at = rows.to(model.device), columns.to(model.device)
    with model.capture_z() as z, model.capture_resid() as resid:
        forward(model, input_ids.to(model.device), attention_mask)
    sites = main_sites(model)
    stream = {k: v[at].double() for k, v in resid.items()}  # (n, d_model)
    end = stream["post", sites[-1].layer]
    frozen = frozen_end(model, norms, resid["post", sites[-1].layer][at], stream.get("final"))
    outputs = {site.layer: z[_key(site)][at] for site in sites}
    parts = written(model, norms, sites, stream, outputs)
    contributions = []
    for vectors in (one.to(end) for one in directions):
        along = vectors if frozen is None else back(frozen, vectors)  # through the frozen norm

        def project(
            wrote: dict[int, torch.Tensor], along: torch.Tensor = along
        ) -> dict[int, torch.Tensor]:
            """layer → (n, …, d_model) to layer → (n, …)."""
            return {
                layer: (part * along.reshape(len(along), *[1] * (part.ndim - 2), -1)).sum(-1)
                for layer, part in wrote.items()
            }

        start = (parts.start * along).sum(-1)
        tail = (
            torch.zeros_like(vectors[:, 0]) if frozen is None else vectors @ frozen.bias.to(vectors)
        )
        total = (vectors * stream.get("final", end)).sum(-1)
        contributions.append(
            Direct(
                start,
                project(parts.heads),
                project(parts.biases),
                project(parts.mlps),
                tail,
                total,
            )
        )
    return contributions


def _key(site: Site) -> Any:
    return site.layer if site.is_main else (site.tower or site.kind, site.layer)
