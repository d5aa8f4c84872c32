"""Which token, through which head, pushes which logit: a head's direct contribution at one position
as a sum over the keys it looks at.

z_h = Σ_k A_k v_k at one query, and what a head writes is linear in z, so with the final norm's
scale (and that of a norm on the attention's branch) frozen the head's direct contribution to a
logit is Σ_k A_k (v_k W_O,h)·u: one number a key (Elhage et al. 2021; Wang et al. 2022, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError, TapError
from interp.inputs.forward import forward
from interp.streams.qk import check_tokens, main_site
from interp.streams.writers import CLOSE, back, frozen_end, heads_and_bias, main_sites
from interp_hooks.heads import Head, parse_heads
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.shown_weights import row_weights
from interp_hooks.weight_rows import of_heads

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks import HookedModel
    from interp_hooks.call import Site
    from interp_hooks.norms import Frozen, Norms
    from interp_hooks.recording import LayerStats


@dataclass(frozen=True)
class Sources:
    """Direct contributions of (head, key) pairs to one direction at one position.

    Attributes:
        heads: the heads.
        position: whose logit it is, and from where the heads look.
        values: (heads, keys) float64; a head's sum is its direct contribution.
        weights: (heads, keys) attention weights of the position's row.

    Example:
        >>> ids = torch.tensor([[5, 9, 7, 5, 9]])
        >>> direction = model.vocabulary().W_U[:, 7]
        >>> found = interp.mechanics.sources(model, ids, direction, ["L2H4", "L3H1"])
        >>> found.values.shape, found.sums().shape
        (torch.Size([2, 5]), torch.Size([2]))
    """

    heads: tuple[Head, ...]
    position: int
    values: torch.Tensor
    weights: torch.Tensor

    def sums(self) -> torch.Tensor:
        """(heads,): each head's direct contribution, over all keys."""
        return self.values.sum(1)

    def top(self, k: int | None = 20) -> pd.DataFrame:
        """Pairs of a head and a key, the largest by size first: `head`, `key`, `weight`, `value`.

        Args:
            k: how many; None for all.
        """
        import pandas as pd

        flat, keys = self.values.flatten(), self.values.shape[1]
        count = len(flat) if k is None else min(k, len(flat))
        order = flat.abs().argsort(descending=True, stable=True)[:count]
        rows = [
            dict(
                head=str(self.heads[i // keys]),
                key=i % keys,
                weight=float(self.weights.flatten()[i]),
                value=float(flat[i]),
            )
            for i in order.tolist()
        ]
        return pd.DataFrame(rows, columns=["head", "key", "weight", "value"])

    def grouped(self, groups: Mapping[str, slice | Sequence[int]]) -> pd.DataFrame:
        """Contributions of groups of keys: a row a head, a column a group, and "rest".

        Args:
            groups: name → keys of the text, none in two groups.

        Raises:
            InputError: a key that is not there, or in two groups.

        Example:
            >>> ids = torch.tensor([[5, 9, 7, 5, 9]])
            >>> direction = model.vocabulary().W_U[:, 7]
            >>> found = interp.mechanics.sources(model, ids, direction, ["L2H4"])
            >>> found.grouped({"first": [0], "middle": slice(1, 3)}).columns.tolist()
            ['first', 'middle', 'rest']
        """
        import pandas as pd

        n = self.values.shape[1]
        taken = torch.zeros(n, dtype=torch.int64)
        columns = {}
        for name, keys in groups.items():
            picked = list(range(n))[keys] if isinstance(keys, slice) else [int(k) for k in keys]
            bad = [k for k in picked if not 0 <= k < n]
            if bad:
                raise InputError(f"There is no key {bad[0]}; the text has {n}, from 0.")
            taken.index_add_(0, torch.tensor(picked, dtype=torch.int64),
                             torch.ones(len(picked), dtype=torch.int64))  # fmt: skip
            columns[name] = self.values[:, picked].sum(1).tolist()
        if bool((taken > 1).any()):
            raise InputError(f"Key {int((taken > 1).nonzero()[0])} is in two groups.")
        columns["rest"] = self.values[:, taken == 0].sum(1).tolist()
        return pd.DataFrame(columns, index=[str(h) for h in self.heads])


@torch.no_grad()
def toward(
    model: HookedModel,
    ids: torch.Tensor,
    at: int,
    heads: Any,
    direction: Callable[[torch.Tensor], torch.Tensor],
) -> Sources:
    """Direct contributions, by key, of heads to a direction at one position; `mechanics.sources`
    says more. The direction is chosen when the end of the stream is known: it is given what the
    final norm makes of it, (d_model,), or the stream itself where there is none."""
    chosen = _chosen(model, heads)
    norms = model.norms()
    rows, frozen, end = _rows(model, norms, ids, at, chosen)
    u = direction(end[0]).double().to(end.device)
    along = u if frozen is None else back(frozen, u[None])[0]
    values, weights = [], []
    for head in chosen:
        layer = rows[head.layer]
        v, a, whole = layer.of(head.head)
        w = _reads(model, norms, layer.site, head.head, layer.z, along)
        parts = a.double() * (v.double() @ w)
        if not abs(float(parts.sum() - whole.double() @ w)) <= _allowed(parts, v):
            raise TapError(
                f"What {head} writes is not Σ_k A_k v_k W_O: something stands between its attention"
                " and W_O (an output gate, a norm), so its keys' shares can't be told."
            )
        values.append(parts.cpu())
        weights.append(a.cpu())
    return Sources(tuple(chosen), at, torch.stack(values), torch.stack(weights))


def _allowed(parts: torch.Tensor, values: torch.Tensor) -> float:
    """Rounding of a sum over keys in the precision of the values."""
    return 1e-30 + float(parts.abs().sum()) * CLOSE.get(values.dtype, 2e-2)


@dataclass
class _Layer:
    """One layer at one query: values (kv_heads, keys, d_head), row weights (chosen, keys), z
    (1, heads, d_head)."""

    site: Site
    heads: tuple[int, ...]
    values: torch.Tensor
    weights: torch.Tensor
    z: torch.Tensor

    def of(self, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(keys, d_head) values, (keys,) weights, (d_head,) z of a head."""
        own = head * len(self.values) // self.z.shape[1]
        return self.values[own], self.weights[self.heads.index(head)], self.z[0, head]


def _chosen(model: HookedModel, heads: Any) -> list[Head]:
    if heads is None:
        return [Head(s.layer, h, s.tower) for s in main_sites(model) for h in range(s.n_heads)]
    pair = (
        isinstance(heads, Sequence) and len(heads) == 2 and all(isinstance(x, int) for x in heads)
    )
    single = isinstance(heads, Head) or pair or (isinstance(heads, str) and "," not in heads)
    asked = [Head.parse(heads)] if single else parse_heads(heads)
    if not asked:
        raise InputError("No head was named; give one or more, or None for all.")
    for head in asked:
        main_site(model, model.check(head))
    return list(dict.fromkeys(asked))


def _rows(
    model: HookedModel, norms: Norms, ids: torch.Tensor, at: int, heads: Sequence[Head]
) -> tuple[dict[int, _Layer], Frozen | None, torch.Tensor]:
    """layer → what its chosen heads did at one query, the final norm frozen there, and what it
    makes of the stream, (1, d_model)."""
    wanted: dict[int, tuple[int, ...]] = {}
    for head in heads:
        wanted[head.layer] = (*wanted.get(head.layer, ()), head.head)
    found: dict[int, _Layer] = {}
    stream: dict[str, torch.Tensor] = {}
    sites = main_sites(model)
    last = sites[-1].layer

    def take(stats: LayerStats) -> None:
        call, site = stats.call, stats.site
        if site not in sites or site.layer not in wanted:
            return
        assert call is not None and stats.z is not None
        check_tokens(model, call, ids)
        some = wanted[site.layer]
        if call.pattern is not None:  # TransformerLens hands over its pattern
            row = call.pattern[0, list(some), at].float()
        else:
            part = of_heads(call, some).part(at, at + 1)
            row = row_weights(part, (), 0, 1)[0, :, 0]
        found[site.layer] = _Layer(site, some, call.value[0], row, stats.z[:, at])

    def keep(place: str, layer: int, tensor: torch.Tensor) -> None:
        if (place == "post" and layer == last) or place == "final":
            stream[place] = tensor[:, at].detach()

    asked, silent = Question(z=True, call=True), Question()
    question = SiteQuestion(
        z=True,
        call=True,
        choose=lambda site: asked if site in sites and site.layer in wanted else silent,
    )
    with model.watch(question, take), model.activations(write=keep):
        forward(model, ids, keep=1)
    missing = [layer for layer in wanted if layer not in found]
    if missing:
        raise TapError(f"{model.name} ran without calling the attention of layer {missing[0]}.")
    frozen = frozen_end(model, norms, stream["post"], stream.get("final"))
    return found, frozen, stream.get("final", stream["post"])


def _reads(
    model: HookedModel, norms: Norms, site: Site, head: int, z: torch.Tensor, along: torch.Tensor
) -> torch.Tensor:
    """(d_head,) w with w · z_h = the head's contribution along (d_model,) `along` of the stream; z
    (1, heads, d_head) of the run freezes a norm on the branch."""
    after = norms.branch(site.layer)
    if after is not None:
        result, bias = heads_and_bias(model, site, z)
        whole = (result.sum(1) + bias).to(next(model.module.parameters()).dtype)
        along = back(after.frozen(whole), along[None])[0]
    return model.head_weights(site.layer, site.tower).W_O[head].double() @ along
