"""A recognised attention (`traced`) as an `AttentionCall`: heads told from the batch, the bias
between q kᵀ and the softmax read as a mask, padding rows found."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.errors import TapError
from interp_hooks.huggingface.traced import HIDDEN, Attention
from interp_hooks.shown_weights import weights_of
from interp_kernels import Mask

#: what attention modules call their number of heads
HEADS = (
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "n_head",
    "num_attn_heads",
    "nhead",
    "heads",
    "num_head",
)


@dataclass
class RealTokens:
    """The 2-D padding masks that the model's forward at hand was given, and whether it is to hand
    over its attentions: a forward pre-hook."""

    model: Any
    two_stacks: bool = False
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    attentions: bool = False

    def __post_init__(self) -> None:
        self.two_stacks = bool(getattr(self.model.config, "is_encoder_decoder", False))
        self._names = list(inspect.signature(self.model.forward).parameters)

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        asked = given.get("output_attentions")
        said = getattr(self.model.config, "output_attentions", False)
        self.attentions = bool(said if asked is None else asked)
        self.masks = {
            name: given[name]
            for name in ("attention_mask", "decoder_attention_mask")
            if isinstance(given.get(name), torch.Tensor) and given[name].ndim == 2
        }

    def of(self, site: Site) -> torch.Tensor | None:
        """(batch, slots) bool of the tokens that a site's queries are; None where nothing says."""
        decodes = self.two_stacks and site.tower != "encoder"
        mask = self.masks.get("decoder_attention_mask" if decodes else "attention_mask")
        return None if mask is None else mask.bool()


@dataclass(frozen=True)
class Fold:
    """How leading dimensions `lead` become (batch, heads): `heads` of them at position `at`, or
    within the only one there is (heads folded into the batch, for `torch.bmm`)."""

    lead: tuple[int, ...]
    heads: int
    at: int | None

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """(…, n, d) as (batch, heads, n, d)."""
        if self.at is None:
            x = x.expand(*self.lead, *x.shape[-2:])
            return x.reshape(self.lead[0] // self.heads, self.heads, *x.shape[-2:])
        lead = [n if i != self.at else x.shape[i] for i, n in enumerate(self.lead)]
        x = x.expand(*lead, *x.shape[-2:]).movedim(self.at, -3)
        return x.reshape(-1, *x.shape[-3:])

    def unfold(self, z: torch.Tensor) -> torch.Tensor:
        """(batch, heads, n, d) as it came."""
        if self.at is None:
            return z.reshape(*self.lead, *z.shape[-2:])
        rest = [n for i, n in enumerate(self.lead) if i != self.at]
        return z.reshape(*rest, *z.shape[1:]).movedim(-3, self.at)


def head_counts(module: torch.nn.Module) -> list[int]:
    """What an attention module, or its config, says of its number of heads."""
    said = [getattr(module, name, None) for name in HEADS]
    said += [_configured(module, name) for name in HEADS]
    return [n for n in said if isinstance(n, int) and n > 0]


def _configured(module: torch.nn.Module, name: str) -> Any:
    """What the config of a module says of a name; None where it says nothing, or another thing for
    each layer (such configs raise)."""
    try:
        return getattr(getattr(module, "config", None), name, None)
    except Exception:
        return None


def fold_of(lead: Sequence[int], module: torch.nn.Module, batch: int, heads: int | None) -> Fold:
    """How an attention's leading dimensions hold batch and heads. Raises `TapError`."""
    sizes = [heads] if heads else head_counts(module)
    if len(lead) == 1:
        for n in sizes:
            if lead[0] % n == 0 and (heads or lead[0] // n % batch == 0):
                return Fold(tuple(lead), n, None)
        if lead[0] % batch == 0:
            return Fold(tuple(lead), lead[0] // batch, None)
    elif len(lead) == 2:
        swapped = lead[1] not in sizes and lead[0] in sizes and lead[1] == batch
        return Fold(tuple(lead), lead[0 if swapped else 1], 0 if swapped else 1)
    elif len(lead) > 2:
        first = int(lead[0] == batch)  # the batch comes first, if it is among them
        places = [i for i, n in enumerate(lead) if n in sizes and i >= first]
        if places:
            return Fold(tuple(lead), lead[places[0]], places[0])
    raise TapError(
        f"{type(module).__name__} computes attention in a tensor with leading dimensions "
        f"{tuple(lead)}, in which its heads can't be told, so the model can't be tapped."
    )


def are_streams(attention: Attention, main: Attention) -> bool:
    """Whether an attention is that of streams beside the `main` one (ProphetNet): queries
    (batch, streams, heads, queries, d) that see all keys of the main one, and then keys of their
    own."""
    n = main.k.shape[-2]
    return (
        attention.k.ndim == main.k.ndim + 1
        and attention.k.shape[-2] == n + attention.q.shape[-2]
        and main.k.shape[:-2] == attention.k.shape[:1] + attention.k.shape[2:-2]
        and bool((attention.k[..., :n, :] == main.k[:, None]).all())
    )


def call_of(
    attention: Attention,
    module: torch.nn.Module,
    site: Site | None,
    batch: int,
    real: RealTokens,
    streams: bool = False,
) -> tuple[AttentionCall, Fold]:
    """The attention as the tap takes it, and how z is to be given back. `streams`: it is one of
    `are_streams`, whose rows are (batch · streams)."""
    q, k, v = attention.q, attention.k, attention.v
    lead = q.shape[:-2] if attention.bias is None else attention.bias.shape[:-2]
    fold = fold_of(lead, module, batch, None if site is None else site.n_heads)
    if streams:
        fold = Fold(tuple(lead), lead[-1], len(lead) - 1)
    q, k, v = fold.fold(q), fold.fold(k), fold.fold(v)
    k, v = (x.expand(-1, max(k.shape[1], v.shape[1]), -1, -1) for x in (k, v))
    if site is None:
        layer, kv_heads = getattr(module, "layer_idx", None), _kv_heads(module, k, v)
        layer = layer if isinstance(layer, int) else -1
        site = Site("", layer, "self", "", fold.heads, kv_heads, q.shape[-1])
    if k.shape[1] > site.n_kv_heads:  # the module repeats them for its query heads
        every = k.shape[1] // site.n_kv_heads
        k, v = k[:, ::every], v[:, ::every]
    weights = None if attention.weights is None else fold.fold(attention.weights)
    bias = None if attention.bias is None else fold.fold(attention.bias)
    blind = None if attention.blind is None else fold.fold(attention.blind)
    mask = mask_of(site, q, k, bias, weights, blind, real)
    sinks = q.new_zeros(site.n_heads) if attention.sinks else None
    return AttentionCall(site, q, k, v, mask, attention.scale, sinks=sinks), fold


def _kv_heads(module: torch.nn.Module, k: torch.Tensor, v: torch.Tensor) -> int:
    """How many different kv heads there are: as many as the config says, if groups are equal."""
    heads = k.shape[1]
    said = [getattr(module, "num_key_value_heads", None)]
    said.append(_configured(module, "num_key_value_heads"))
    for n in said:
        if isinstance(n, int) and 0 < n < heads and heads % n == 0:
            grouped = [x.unflatten(1, (n, heads // n)) for x in (k, v)]
            if all(bool((x == x[:, :, :1]).all()) for x in grouped):
                return n
    return heads


def mask_of(
    site: Site,
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    blind: torch.Tensor | None,
    real: RealTokens,
) -> Mask:
    """Who sees whom, from the bias (batch, heads, queries, keys): keys it hides, and what it adds
    to the logits of the others."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    if bias is None:
        dense = None
        seen = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool, device=q.device)
    else:
        hidden = bias <= HIDDEN
        if weights is not None:  # far back under ALiBi a bias is low as well, in rows that see more
            hidden = hidden & ((weights == 0) | hidden.all(-1, keepdim=True))
        seen = ~hidden
        dense = _compact(bias, seen, q)
        seen = seen if blind is None else seen & ~blind
        seen = seen.any(1, keepdim=True)
    q_start = _start(site, seen, n_queries, n_keys)
    rows, starts = _real_rows(site, seen, real, q_start)
    return Mask(False, None, q_start, 0, None, rows, dense, starts=starts)


def _compact(bias: torch.Tensor, seen: torch.Tensor, q: torch.Tensor) -> torch.Tensor | None:
    """The mask in the smallest form that holds it: None for nothing, bool where nothing is added
    to logits, else the float bias."""
    added = bias.masked_fill(~seen, 0.0)
    size = float(added.detach().abs().max()) if added.numel() else 0.0
    rounding = {torch.float64: 1e-12, torch.float32: 2e-5}.get(q.dtype, 0.0)
    if size <= rounding:
        if bool(seen.all()):
            return None
        seen = seen[:, :1] if bool((seen == seen[:, :1]).all()) else seen
        return seen[:1] if bool((seen == seen[:1]).all()) else seen
    bias = bias.masked_fill(~seen, -math.inf)
    return bias if q.dtype == torch.float64 else bias.float()


def _start(site: Site, seen: torch.Tensor, n_queries: int, n_keys: int) -> int:
    """The slot of the first query row: where the last key stands that it sees, if every row sees
    one key more than the one before it (a static cache holds keys that nobody sees)."""
    if site.kind == "cross" or n_queries > n_keys:
        return 0
    ends = seen.any(0)[0].int()  # (queries, keys)
    ends = n_keys - 1 - ends.flip(-1).argmax(-1)
    steps = torch.arange(n_queries, device=ends.device)
    if bool((ends - steps == ends[0]).all()):
        return int(ends[0])
    return n_keys - n_queries


def _real_rows(
    site: Site, seen: torch.Tensor, real: RealTokens, q_start: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(batch, queries) bool, the rows that are no padding, and (batch,) the slots of first real
    tokens: by the forward's mask where it is this tower's, else rows that see themselves."""
    n_queries, n_keys = seen.shape[-2:]
    tokens = real.of(site)
    last = q_start + n_queries
    if tokens is not None and site.kind == "cross":
        last = tokens.shape[1]
    if tokens is not None and (site.kind == "cross" or tokens.shape[1] in (n_keys, last)):
        tokens = tokens.to(seen.device)
        if n_queries > last or bool(tokens.all()):
            return None, None
        rows = tokens[:, last - n_queries : last]
        return rows, None if site.kind == "cross" else tokens.int().argmax(1)
    if site.kind == "cross" or n_queries > n_keys:
        return None, None
    steps = torch.arange(n_queries, device=seen.device)
    own = seen[:, 0, steps, q_start + steps]  # (batch or 1, queries)
    return (None if bool(own.all()) else own), None


def keeping_weights(call: AttentionCall) -> AttentionCall:
    """The call of a module that hands over its own attention weights: raises `TapError` once edits
    make them others than these."""

    def check(weights: torch.Tensor) -> None:
        if not torch.equal(weights, weights_of(call)):
            raise TapError(
                f"Layer {call.site.layer} hands over its attention weights as they are before "
                "edits, so output_attentions=True can't be answered in the block of an edit that "
                "changes them; leave the block, or use model.observe(..., stage='after')."
            )

    return replace(call, weights=check)
