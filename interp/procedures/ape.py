"""APE: contexts encoded in parallel, at the same positions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import EditError, InputError
from interp.inputs.batches import similar
from interp.inputs.context import check_context
from interp.inputs.forward import forward
from interp.inputs.tokenizer import pad_id, stop_tokens
from interp.procedures.decoding import Choice, check_procedure, decode, token_ids
from interp_hooks.edit import Edit
from interp_kernels import Mask, attention

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.model import HookedModel

TextLike = str | Sequence[int] | torch.Tensor
Layers = list[
    tuple[torch.Tensor, torch.Tensor]
]  # keys and values of each layer, (batch, kv_heads, tokens, d)


@dataclass(frozen=True)
class APE:
    """Adaptive parallel encoding (APE): contexts are encoded apart and read together.

    (Yang et al., ICLR 2025, arXiv 2502.05431.) The shared prefix (p tokens) is encoded once; each
    context after it alone, at positions p, p + 1, …; the caches are joined; the query stands at p +
    longest context. Its rows, and those of what is generated, attend to two groups of keys,

        C = contexts, logits s / T, log-sum-exp L_C × (S·T)
        R = prefix, query, generated: s, L_R
        z = (e^{S·T·L_C} ẑ_C + e^{L_R} ẑ_R) / (e^{S·T·L_C} + e^{L_R}),

    with ẑ the softmax averages of each group. T = S = 1 is plain attention over the joined cache;
    with one context, the model's own.

    Texts are strings or token ids; the prefix gets the tokenizer's BOS, contexts and query follow
    as they are. One text at a time. Edits around it act while contexts are encoded and while the
    query runs; but there this procedure makes z anew from queries, keys and values, so of outer
    edits those that change weights or z do not show. Models with sliding windows are refused.

    Args:
        temperature: T, above 0.
        scale: S, above 0.

    Misleads:
        Contexts do not see each other: what only two of them together say is not read as it would
        be in one text.

    Raises:
        EditError: T or S not above 0.

    Example:
        >>> ape = interp.procedures.APE(temperature=1.0, scale=1.0)
        >>> contexts = ["the cat saw the dog .", "the king had a ring ."]
        >>> ape.logits(model, "the story :", contexts, "the cat").ndim
        2
    """

    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.scale <= 0:
            raise EditError(
                f"Temperature and scale of APE are above 0, not {self.temperature} and "
                f"{self.scale}."
            )

    @torch.no_grad()
    def encode(self, model: Any, prefix: TextLike, contexts: Sequence[TextLike]) -> Encoded:
        """The joined cache of prefix and contexts, for any number of queries.

        Args:
            model: a `HookedModel`, or anything `interp.load` takes.
            prefix: what all contexts share.
            contexts: each encoded by itself.

        Raises:
            InputError: no cache, no context, an empty text, sliding windows.
            ContextError: a context past the model's positions.

        Example:
            >>> contexts = ["the cat saw the dog .", "the king had a ring ."]
            >>> joined = interp.procedures.APE().encode(model, "the story :", contexts)
            >>> len(joined.lengths)
            2
        """
        from interp.loading import load

        hooked = load(model)
        check_procedure(hooked, "APE")
        head = token_ids(hooked, prefix, start=True)
        parts = [token_ids(hooked, c, start=False) for c in contexts]
        if not head or not parts or not all(parts):
            raise InputError(
                "APE needs a prefix of at least one token (BOS will do) and contexts that are not "
                "empty."
            )
        longest = max(map(len, parts))
        check_context(hooked, len(head) + longest)
        out = forward(hooked, torch.tensor([head]), use_cache=True, keep=1)
        joined = start = layers(hooked, out.past_key_values)
        pieces: list[Layers | None] = [None] * len(parts)
        for some in similar([len(part) for part in parts]):
            width = max(len(parts[i]) for i in some)
            # pads stand after the real tokens, which causality keeps from seeing them
            ids = torch.full((len(some), width), pad_id(hooked.tokenizer))
            for row, i in enumerate(some):
                ids[row, : len(parts[i])] = torch.tensor(parts[i])
            cache = refill(start, len(some))
            places = torch.arange(len(head), len(head) + width)[None].expand(len(some), -1)
            out = forward(
                hooked, ids, use_cache=True, past_key_values=cache, position_ids=places, keep=1
            )
            by_layer = layers(hooked, out.past_key_values)
            for row, i in enumerate(some):
                cut = slice(len(head), len(head) + len(parts[i]))
                pieces[i] = [
                    (k[row : row + 1, :, cut], v[row : row + 1, :, cut]) for k, v in by_layer
                ]
        for piece in pieces:
            assert piece is not None
            joined = [
                (torch.cat([k, a], 2), torch.cat([v, b], 2))
                for (k, v), (a, b) in zip(joined, piece, strict=True)
            ]
        return Encoded(hooked, self, joined, len(head), tuple(map(len, parts)))

    def logits(
        self, model: Any, prefix: TextLike, contexts: Sequence[TextLike], query: TextLike
    ) -> torch.Tensor:
        """Logits of the query after the contexts, (query tokens, vocabulary).

        Args:
            model, prefix, contexts: as in `encode`.
            query: the text after them.
        """
        return self.encode(model, prefix, contexts).logits(query)

    def generate(
        self,
        model: Any,
        prefix: TextLike,
        contexts: Sequence[TextLike],
        query: TextLike,
        **options: Any,
    ) -> torch.Tensor:
        """Generates the continuation of the query after the contexts, (new tokens,).

        Args:
            model, prefix, contexts, query: as in `logits`.
            options: those of `Encoded.generate`.

        Example:
            >>> ape = interp.procedures.APE()
            >>> ape.generate(model, "a story :", ["the cat ran ."], "the", max_new_tokens=3).ndim
            1
        """
        return self.encode(model, prefix, contexts).generate(query, **options)


@dataclass(frozen=True)
class Encoded:
    """Contexts encoded by `APE.encode`: keys and values of each layer.

    The prefix stands first, then the contexts in order.
    """

    model: HookedModel
    settings: APE
    layers: Layers
    prefix: int
    lengths: tuple[int, ...]

    @property
    def edit(self) -> Edit:
        """The edit under which the query runs on the joined cache."""
        end = self.prefix + sum(self.lengths)
        return _Merge(
            self.prefix, end, self.settings.temperature, self.settings.scale, self.model.backend
        )

    def run(self, ids: Sequence[int] | torch.Tensor, cache: Any, after: int = 0) -> torch.Tensor:
        """(tokens, vocabulary) of tokens that follow `after` tokens of the query; `cache` grows.
        Inside `edit`."""
        first = self.prefix + max(self.lengths) + after
        row = torch.as_tensor(ids)[None]
        check_context(self.model, first + row.shape[1])
        places = torch.arange(first, first + row.shape[1])[None]
        return forward(
            self.model, row, use_cache=True, past_key_values=cache, position_ids=places
        ).logits[0]

    @torch.no_grad()
    def logits(self, query: TextLike) -> torch.Tensor:
        """Logits of a query, (query tokens, vocabulary)."""
        with self.model.edit(self.edit):
            return self.run(self._query(query), refill(self.layers, 1))

    @torch.no_grad()
    def generate(
        self,
        query: TextLike,
        max_new_tokens: int = 64,
        sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> torch.Tensor:
        """Generates the continuation of a query, (new tokens,).

        Args:
            query: the text after the contexts.
            max_new_tokens: at most so many.
            sample: draw from softmax(logits / temperature) cut to `top_p`, seeded; otherwise
                greedy.
            temperature, top_p, seed: of the draws.
        """
        ids = self._query(query)
        choice = Choice(sample, temperature, top_p, seed)
        cache = refill(self.layers, 1)
        after = itertools.count(len(ids))
        with self.model.edit(self.edit):
            first = self.run(ids, cache)[-1:]
            stop, pad = stop_tokens(self.model), pad_id(self.model.tokenizer)
            return decode(
                first, lambda t: self.run(t, cache, next(after)), choice, max_new_tokens, stop, pad
            )[0]

    def _query(self, query: TextLike) -> list[int]:
        ids = token_ids(self.model, query, start=False)
        if not ids:
            raise InputError("The query is empty; give the text that follows the contexts.")
        return ids


@dataclass(frozen=True)
class _Merge(Edit):
    """Attention of the rows after the contexts, in slots start:stop, as `APE` says."""

    start: int
    stop: int
    temperature: float
    context_scale: float
    backend: str = "auto"

    def is_identity(self) -> bool:
        return self.temperature == 1 and self.context_scale == 1

    def touches(self, call: AttentionCall) -> bool:
        return call.site.kind == "self" and call.mask.q_start >= self.stop

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        if (
            call.query is None
            or call.key is None
            or call.mask.k_start
            or call.mask.window is not None
        ):
            raise EditError(
                f"APE needs plain causal attention, which layer {call.site.layer} has not."
            )
        a, b = self.start, self.stop
        context = replace(call, key=call.key[:, :, a:b], value=call.value[:, :, a:b])
        own = replace(
            call,
            key=torch.cat([call.key[:, :, :a], call.key[:, :, b:]], 2),
            value=torch.cat([call.value[:, :, :a], call.value[:, :, b:]], 2),
        )
        # all contexts are before the query; without them the query's slots are b − a fewer
        contexts = self._attend(context, Mask(causal=False), 1 / self.temperature, sinks=False)
        rest = self._attend(own, Mask(q_start=call.mask.q_start - (b - a)), 1.0, sinks=True)
        return (
            merge(contexts, rest, self.context_scale * self.temperature).transpose(1, 2).to(z.dtype)
        )

    def _attend(
        self, call: AttentionCall, mask: Mask, sharper: float, sinks: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert call.query is not None and call.key is not None
        cap = (
            None if call.softcap is None else call.softcap * sharper
        )  # the capped logits are divided by T
        result = attention(
            call.query,
            call.key,
            call.value,
            mask=mask,
            scale=call.scaling * sharper,
            softcap=cap,
            sinks=call.sinks if sinks else None,
            backend=self.backend,
        )
        return result.out, result.lse

    def route(self, site: Site) -> str:
        return "ape: contexts and the rest apart, merged by log-sum-exp"


def merge(
    context: tuple[torch.Tensor, torch.Tensor],
    rest: tuple[torch.Tensor, torch.Tensor],
    factor: float,
) -> torch.Tensor:
    """(batch, heads, queries, d) of two groups of keys, each (ẑ, log-sum-exp (batch, heads,
    queries)); the first one's log-sum-exp × factor."""
    weight = torch.softmax(torch.stack([context[1] * factor, rest[1]]), 0)[
        ..., None
    ]  # (2, batch, heads, queries, 1)
    return weight[0] * context[0] + weight[1] * rest[0]


def layers(model: HookedModel, cache: Any) -> Layers:
    """Keys and values of each layer of a cache. Raises `InputError` where a layer does not keep all
    tokens."""
    pairs = []
    for layer in getattr(cache, "layers", [None]):
        keys = getattr(layer, "keys", None)
        if keys is None or getattr(layer, "is_sliding", False):
            raise InputError(
                f"APE needs a plain cache of keys and values in every layer, and {model.name} has "
                "others."
            )
        pairs.append((keys, layer.values))
    return pairs


def refill(kept: Layers, batch: int) -> Any:
    """A new cache holding these keys and values, for each row of a batch."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (k, v) in enumerate(kept):
        cache.update(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), index)
    return cache
