"""Why a head looks where it looks: the score of one query and one key as a sum over pairs of
writers of their streams.

The score that goes into the softmax is s = scaling · q·k (Elhage et al. 2021, the QK circuit, with
everything in it). Both streams are sums of what was written earlier, x = Σ_c x_c, and with the
scales of the norm before attention, and of norms of queries and keys, held at their values in the
run, q and k are linear in them, rotation included. So s = Σ_{u,v} q_u·k_v · scaling, a table
writers × writers that is exact.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError, TapError
from interp.inputs.forward import forward
from interp.streams.score_maps import ScoreMap, Way, score_map, watching
from interp.streams.writers import Written, main_sites, written
from interp_hooks.heads import Head
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.shown_weights import row_weights
from interp_hooks.weight_rows import of_heads
from interp_hooks.whole_numbers import quoted, whole
from interp_kernels import visible

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks import HookedModel
    from interp_hooks.call import AttentionCall, Site

#: largest difference between the table's sum and the score, relative to scaling · ‖q‖ ‖k‖
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Writer:
    """One that wrote into the stream, or put a constant into what reads it.

    `component`: "embedding"; "before", the embedding with what else came before the first attention
    (hybrid models whose first blocks have none); "position" (learned; within the embedding where
    the two can't be told apart); "head"; "attention_bias", b_O and the bias of a norm after
    attention; "mlp", all that a block adds besides its attention; "bias", of the norm before
    attention and of the projection. `layer` and `head` are −1 where it has none.

    Example:
        >>> ids = torch.tensor([[5, 9, 7, 5, 9]])
        >>> found = interp.mechanics.qk_attribution(model, ids, "L2H4", query=4, key=2)
        >>> found.writers[0].component, str(found.writers[1])
        ('embedding', 'L0H0')
    """

    component: str
    layer: int = -1
    head: int = -1

    def __str__(self) -> str:
        return {
            "head": f"L{self.layer}H{self.head}",
            "mlp": f"MLP {self.layer}",
            "attention_bias": f"b_O {self.layer}",
            "before": f"before layer {self.layer}",
        }.get(self.component, self.component)


@dataclass(frozen=True)
class QKAttribution:
    """The score of a head from one query to one key, by who wrote the query and who the key.

    Attributes:
        head, query, key: the head, and both places in the text.
        writers: earlier parts of the model, in the order in which they write.
        table: (writers, writers) float64: query-writers × key-writers; its sum is `score`.
        score: scaling · q·k of the run, before a softcap.
        softcap: c of c·tanh(s / c), which the model puts on the score; None without one.
        mask_bias: what the mask adds after that (ALiBi, relative positions); 0 without one.
        weight: the attention weight, after softmax.

    Example:
        >>> ids = torch.tensor([[5, 9, 7, 5, 9]])
        >>> found = interp.mechanics.qk_attribution(model, ids, "L2H4", query=4, key=2)
        >>> found.table.shape == (len(found.writers), len(found.writers))
        True
        >>> bool(abs(found.table.sum() - found.score) < 1e-4)
        True
    """

    head: Head
    query: int
    key: int
    writers: tuple[Writer, ...]
    table: torch.Tensor
    score: float
    softcap: float | None
    mask_bias: float
    weight: float

    @property
    def frame(self) -> pd.DataFrame:
        """The table with names: rows wrote the query's stream, columns the key's."""
        import pandas as pd

        names = [str(w) for w in self.writers]
        frame = pd.DataFrame(self.table.numpy(), index=names, columns=names)
        return frame.rename_axis(index="query", columns="key")

    def pairs(self, k: int | None = None) -> pd.DataFrame:
        """Pairs of writers, the largest by size first: `query`, `key`, `score`.

        Args:
            k: how many; None for all.
        """
        import pandas as pd

        flat = self.table.flatten()
        order = flat.abs().argsort(descending=True, stable=True)[: len(flat) if k is None else k]
        n = len(self.writers)
        rows = [
            dict(
                query=str(self.writers[i // n]), key=str(self.writers[i % n]), score=float(flat[i])
            )
            for i in order.tolist()
        ]
        return pd.DataFrame(rows, columns=["query", "key", "score"])

    def by_query(self) -> pd.Series:
        """What each writer of the query's stream adds to the score, over all writers of the key."""
        return self.frame.sum(axis=1)

    def by_key(self) -> pd.Series:
        """What each writer of the key's stream adds to the score, over all writers of the query."""
        return self.frame.sum(axis=0)


def split(model: HookedModel, ids: torch.Tensor, head: Head, query: int, key: int) -> QKAttribution:
    """The score of a head from one query to one key, over the writers of both streams, in one
    forward of `ids` (1, tokens) up to the head's layer; `mechanics.qk_attribution` says more."""
    site = main_site(model, head)
    run = _run(model, ids, site, head.head, (query, key))
    return _split(model, site, head, run, (query, key))


def main_site(model: HookedModel, head: Head) -> Site:
    """The attention of the main tower that a head is of. Raises `InputError`, `TapError`."""
    site = next((s for s in main_sites(model) if s.layer == head.layer), None)
    if site is None or head.tower not in ("", site.tower):
        raise InputError(f"{head} is no head of the tower that reads and writes tokens.")
    return site


def one_text(model: HookedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """(1, tokens) on the model's device. Raises `InputError` for other shapes, and under edits."""
    if not isinstance(input_ids, torch.Tensor):
        raise InputError(f"input_ids are a tensor of token ids, not {quoted(input_ids)}.")
    ids = input_ids.long().reshape(1, -1) if input_ids.ndim < 2 else input_ids.long()
    if ids.ndim != 2 or len(ids) != 1 or not ids.numel():
        raise InputError(f"One text is split at a time, (1, tokens), not {tuple(ids.shape)}.")
    if model.observers_and_edits()[1]:
        raise InputError(
            "A score is split as the model itself makes it; leave the block of model.edit(...) "
            "first."
        )
    return ids.to(model.device)


def place_in(ids: torch.Tensor, place: int, what: str) -> int:
    """A place in the text from 0. Raises `InputError`."""
    n, number = ids.shape[1], whole(place)
    if number is None or not -n <= number < n:
        raise InputError(f"There is no {what} {quoted(place)}; the text has {n} tokens, from 0.")
    return number % n


class Reached(Exception):
    """Ends a forward whose layer was seen."""


@dataclass
class _Run:
    """One forward up to a layer at two positions: the stream (place, layer) → (2, d_model) in the
    model's precision, z layer → (2, heads, d_head), the call and the way of queries and keys."""

    stream: dict[tuple[str, int], torch.Tensor]
    z: dict[int, torch.Tensor]
    way: Way
    ids: torch.Tensor
    call: AttentionCall | None = None


def _run(
    model: HookedModel, ids: torch.Tensor, site: Site, head: int, places: tuple[int, int]
) -> _Run:
    run = _Run({}, {}, Way(site.layer), ids[0, list(places)])

    def keep(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if place in ("pre", "mid", "post"):
            if tensor.ndim != 3 or len(tensor) != 1:
                raise TapError(
                    f"The residual stream of {model.name} is {tuple(tensor.shape)}, not (batch, "
                    "tokens, d_model), so its writers can't be told."
                )
            run.stream[place, layer] = tensor[0, list(places)].detach()
        elif place == "z" and layer != site.layer:
            run.z[layer] = tensor[0, list(places)].detach()
        elif place in "qk":
            return run.way.at_call(place, layer, tensor)
        return None

    def stop(stats: Any) -> None:
        if stats.site == site:
            run.call = stats.call
            raise Reached

    question = SiteQuestion(call=True, choose=lambda at: Question(call=True))
    try:
        with watching(model, {site: run.way}), model.activations(write=keep), model.watch(
            question, stop, "after"
        ):  # fmt: skip
            forward(model, ids, keep=1)
    except Reached:
        pass
    if run.call is None:
        raise TapError(
            f"{model.name} ran without calling the attention of layer {site.layer}, so there is "
            "nothing to split."
        )
    if run.call.query is None:
        raise TapError(
            f"{model.name} shows its queries and keys before rotation only (TransformerLens), so a "
            "score can't be split; load the model from its Hugging Face name."
        )
    check_tokens(model, run.call, ids)
    return run


def check_tokens(model: HookedModel, call: AttentionCall, ids: torch.Tensor) -> None:
    """Raises `TapError` where attention has other tokens than the text (a learned prompt before
    it), since places would mean others."""
    if (call.n_queries, call.n_keys) != (ids.shape[1],) * 2 or call.mask.q_start:
        raise TapError(
            f"Layer {call.site.layer} of {model.name} attends from {call.n_queries} tokens to "
            f"{call.n_keys} in a text of {ids.shape[1]}, so places in the text are not its own."
        )


@torch.no_grad()
def _split(
    model: HookedModel, site: Site, head: Head, run: _Run, places: tuple[int, int]
) -> QKAttribution:
    call = run.call
    assert call is not None and call.query is not None and call.key is not None
    query, key = places
    weight = _weight(call, head, query, key)
    names, parts, bias = parts_of(model, site, run)  # (2, writers, d_model), (2, d_model)
    weights = model.head_weights(site.layer, site.tower)
    own = head.head * call.key.shape[1] // call.query.shape[1]
    with torch.enable_grad():
        (to_q, q), (to_k, k) = (
            score_map(model, run.way, "q", query, head.head),
            score_map(model, run.way, "k", key, own),
        )
    by_q = _read(parts[0], bias[0], weights.W_Q[head.head], weights.b_Q, head.head, to_q)
    by_k = _read(parts[1], bias[1], weights.W_K[head.head], weights.b_K, head.head, to_k)
    table = call.scaling * by_q @ by_k.T
    score = float(call.scaling * (q @ k))
    size = abs(call.scaling) * float(q.norm() * k.norm())
    if not abs(float(table.sum()) - score) <= CLOSE.get(call.query.dtype, 2e-2) * max(size, 1e-30):
        raise TapError(
            f"What the writers of {model.name} put into the queries and keys of layer {site.layer} "
            "does not add up to the score, so it can't be split."
        )
    keep = [i for i in range(len(names)) if bool(by_q[i].any()) or bool(by_k[i].any())]
    return QKAttribution(
        head,
        query,
        key,
        tuple(names[i] for i in keep),
        table[keep][:, keep].cpu(),
        score,
        call.softcap,
        _bias_of(call, head, query, key),
        weight,
    )


def _read(
    parts: torch.Tensor,
    bias: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    head: int,
    to: ScoreMap,
) -> torch.Tensor:
    """(writers + 1, d_head): what each writer, and last the biases, put into the call's vector."""
    W = W.to(parts)
    constant = bias @ W if b is None else bias @ W + b[head].to(parts)
    return torch.cat([parts @ W @ to.matrix, (constant @ to.matrix + to.offset)[None]])


def parts_of(
    model: HookedModel, site: Site, run: _Run
) -> tuple[list[Writer], torch.Tensor, torch.Tensor]:
    """Writers with "bias" as the last; (2, writers − 1, d_model) float64 what attention reads of
    each at the run's positions; (2, d_model) the bias of the norm. Raises `TapError`."""
    norms = model.norms()
    stream = {key: value.double() for key, value in run.stream.items()}
    earlier = [s for s in main_sites(model) if s.layer < site.layer]
    sums = written(model, norms, earlier, stream, run.z, into=site.layer)
    names, parts = _listed(model, sums, run.ids, (earlier or [site])[0].layer)
    together = torch.stack(parts, 1)  # (2, writers, d_model)
    before = norms.attention(site.layer)
    bias = together.new_zeros(together.shape[0], together.shape[2])
    if before is not None:
        frozen = before.frozen(run.stream["pre", site.layer])
        together = before.centred(together) * before.gain * frozen.scale[:, None]
        bias = bias + frozen.bias
    return [*names, Writer("bias")], together, bias


def _listed(
    model: HookedModel, sums: Written, ids: torch.Tensor, first: int
) -> tuple[list[Writer], list[torch.Tensor]]:
    """Writers in the order in which they write, and (positions, d_model) of each; `first`: the
    first layer that the stream was seen to enter."""
    names, parts = [Writer("embedding") if first == 0 else Writer("before", first)], [sums.start]
    if first == 0 and model.position_table is not None:
        with suppress(TapError):  # the token's own part is not known: both stand together
            token = model.vocabulary().embed(ids).to(sums.start)
            names, parts = [*names, Writer("position")], [token, sums.start - token]
    for layer, heads in sums.heads.items():
        names += [Writer("head", layer, h) for h in range(heads.shape[1])]
        parts += list(heads.unbind(1))
        for component, values in (("attention_bias", sums.biases), ("mlp", sums.mlps)):
            names.append(Writer(component, layer))
            parts.append(values[layer])
    return names, parts


def _weight(call: AttentionCall, head: Head, query: int, key: int) -> float:
    """The attention weight. Raises `InputError` where the query does not see the key."""
    row = of_heads(call, (head.head,)).part(query, query + 1)
    seen = visible(row.mask, 1, 1, call.n_keys, call.value.device)
    if not bool(seen[..., key].any()):
        why = "a token sees only itself and earlier ones" if key > query else "out of its window"
        raise InputError(f"{head} does not look from token {query} at token {key}: {why}.")
    return float(row_weights(row, (), 0, 1)[0, 0, 0, key])


def _bias_of(call: AttentionCall, head: Head, query: int, key: int) -> float:
    """What the mask adds to the score."""
    dense = call.mask.dense
    if dense is None or dense.dtype == torch.bool:
        return 0.0
    return float(dense[0, head.head if dense.shape[1] > 1 else 0, query, key])
