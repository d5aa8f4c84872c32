"""Our mask function for transformers: says *which* mask is meant instead of building it.

Plain causal, sliding-window, bidirectional and padding masks become an `interp_kernels.Mask` in
O(L) memory. Anything else (image blocks that see each other, packed sequences, chunks) stays a 4-D
boolean mask. It travels through the model as a tensor with the description attached, because models
hand masks on as tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from interp_hooks.call import AttentionCall
from interp_hooks.errors import TapError
from interp_kernels import Mask

#: what leaves a mask as it is: a copy is described by the same description
_COPIES = ("contiguous", "clone", "detach", "to", "requires_grad_")


class DescribedMask(torch.Tensor):
    """The (batch, keys) padding mask, or the 4-D mask, carrying `description`. Copies keep it,
    other derived tensors lose it.

    Attributes:
        description: who sees whom.
        sizes: queries and keys that it was made for.
    """

    description: Mask | None = None
    sizes: tuple[int, int] | None = None

    @staticmethod
    def wrap(tensor: torch.Tensor, description: Mask, sizes: tuple[int, int]) -> DescribedMask:
        out = tensor.as_subclass(DescribedMask)
        out.description, out.sizes = description, sizes
        return out

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        source = args[0] if args else None
        if (
            isinstance(out, DescribedMask)
            and isinstance(source, DescribedMask)
            and source.description is not None
            and out.description is None
            and getattr(func, "__name__", "") in _COPIES
        ):
            out.description, out.sizes = _moved(source.description, out.device), source.sizes
        return out


def _moved(mask: Mask, device: torch.device) -> Mask:
    """The mask with its tensors on `device`."""
    tensors = ("keys", "queries", "dense", "starts")
    return replace(
        mask,
        **{name: x.to(device) for name in tensors if (x := getattr(mask, name)) is not None},
    )


def _conditions(function: Callable[..., Any]) -> dict[str, Any] | None:
    """The mask function as {"causal": bool, "window": int | None}, None if it is anything more."""
    if torch.compiler.is_compiling():
        return _while_compiling(function)
    name = getattr(function, "__qualname__", "")
    if name == "causal_mask_function":
        return dict(causal=True, window=None)
    if name == "bidirectional_mask_function":
        return dict(causal=False, window=None)
    cells = dict(
        zip(
            function.__code__.co_freevars,
            (c.cell_contents for c in function.__closure__ or ()),
            strict=True,
        )
    )
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return dict(causal=None, window=cells["sliding_window"])
    if name == "and_masks.<locals>.and_mask":
        conditions: dict[str, Any] = dict(causal=None, window=None)
        for part in cells["mask_functions"]:
            one = _conditions(part)
            if one is None:
                return None
            if one["causal"] is not None:
                conditions["causal"] = bool(conditions["causal"]) or one["causal"]
            if one["window"] is not None:
                conditions["window"] = min(one["window"], conditions["window"] or one["window"])
        return conditions
    return None


def _while_compiling(function: Callable[..., Any]) -> dict[str, Any] | None:
    """The same where closures can't be looked into: the two plain kinds; all others stay a mask of
    four dimensions."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if function is causal_mask_function:
        return dict(causal=True, window=None)
    if function is bidirectional_mask_function:
        return dict(causal=False, window=None)
    return None


def _says(mask: DescribedMask, plain: dict[str, Any] | None, sizes: tuple[int, int]) -> bool:
    """Whether a described mask is the one that is asked for again; raises `TapError` where it is
    another and hides padding that can't be read from it."""
    description = mask.description
    assert description is not None
    if plain == dict(causal=description.causal, window=description.window) and mask.sizes == sizes:
        return True
    if description.keys is not None or description.dense is not None:
        raise TapError(
            "The mask that was made for this static cache is another than the model makes for "
            "itself, so padding can't be told; generate with a dynamic cache "
            "(cache_implementation='dynamic'), or without padding."
        )
    return False


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> DescribedMask:
    """The function registered with `transformers.AttentionMaskInterface`."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = mask_function or causal_mask_function
    q_start, k_start = int(q_offset), int(kv_offset)
    keys = queries = starts = None
    # a function that says nothing of causality (an overlay alone) is not one of the compact kinds
    plain = _conditions(mask_function)
    if isinstance(attention_mask, DescribedMask) and attention_mask.description is not None:
        # generate makes the mask of a static cache before the forward, which makes it once more
        if _says(attention_mask, plain, (q_length, kv_length)):
            return attention_mask
        attention_mask = None
    if attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask.bool()
        missing = max(k_start + kv_length, q_start + q_length) - real.shape[1]
        if missing > 0:  # a static cache is wider than what was seen; causality hides the rest
            real = torch.nn.functional.pad(real, (0, missing))
        if not bool(attention_mask.all()):
            starts = real.int().argmax(1)  # the slot of each sample's first real token
            keys = real[:, k_start : k_start + kv_length].contiguous()
            queries = real[:, q_start : q_start + q_length]
    if (
        plain is not None
        and plain["causal"] is not None
        and (plain["causal"] or plain["window"] is None)
    ):
        description = Mask(
            plain["causal"], plain["window"], q_start, k_start, keys, queries, starts=starts
        )
        carrier = keys
        if carrier is None:  # a row a sample without memory of its own: some models view it so
            row = torch.ones(1, kv_length, dtype=torch.bool, device=device)
            carrier = row.expand(batch_size, -1)
        return DescribedMask.wrap(carrier, description, (q_length, kv_length))
    dense: Any = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_start,
        kv_offset=k_start,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=kwargs.get("use_vmap", False),
        device=device,
    )
    return DescribedMask.wrap(
        dense,
        Mask(False, None, q_start, k_start, None, queries, dense, starts=starts),
        (q_length, kv_length),
    )


def read(
    mask: torch.Tensor | None, module: torch.nn.Module, n_queries: int, n_keys: int, kwargs: dict
) -> Mask:
    """The description of the mask that reached an attention call.

    None means: nothing but the module's own causality, bottom-right aligned (the queries are the
    last rows). A 4-D tensor of the caller's own is used as it is. Raises `TapError` if the model
    changed our mask on the way.
    """
    description = getattr(mask, "description", None)
    if description is not None:
        sizes = getattr(mask, "sizes", None)
        return _fitting(description, sizes or (n_queries, n_keys), module, n_queries, n_keys)
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return Mask(
            bool(causal) and n_queries > 1, q_start=max(0, n_keys - n_queries) if causal else 0
        )
    if mask.ndim == 4:
        plain = mask.as_subclass(torch.Tensor)[..., :n_keys]
        return Mask(False, q_start=max(0, n_keys - n_queries), dense=plain)
    raise TapError(
        f"{type(module).__name__} changed the attention mask into shape {tuple(mask.shape)} on its "
        "way to attention, "
        "so the tap cannot tell who sees whom; this model can't be tapped."
    )


def _fitting(
    mask: Mask, sizes: tuple[int, int], module: torch.nn.Module, n_queries: int, n_keys: int
) -> Mask:
    """`mask`, checked against the queries and keys that came: the cache has the last word on where
    the queries stand.

    A model whose cache tells lengths wrongly (MiniMax: its first layer keeps none) makes the mask
    of a decode step for the new key alone; attention then spreads it over all keys. Raises
    `TapError` where what the model does with such a mask can't be told.
    """
    last = mask.q_start + n_queries - 1
    if sizes == (n_queries, n_keys) and not (mask.causal and last > mask.k_start + n_keys - 1):
        return mask
    if sizes == (1, 1) and n_queries == 1 and mask.keys is None and mask.dense is None:
        return replace(mask, window=None, q_start=n_keys - 1, k_start=0)
    raise TapError(
        f"{type(module).__name__} made a mask for {sizes[0]} queries and {sizes[1]} keys and "
        f"attends with {n_queries} to {n_keys}, so who sees whom can't be told; run this text "
        "without a cache (use_cache=False), or without padding."
    )


def real_tokens(mask: Any) -> torch.Tensor | None:
    """(batch, slots) or (batch, tokens), 0 for padding, of a mask that a model's forward is given:
    2-D, or one that was made for a static cache before; None where all are real."""
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    description = getattr(mask, "description", None)
    return description.queries if description is not None else mask


class QueryRows:
    """Where the query rows of cross-attention stand: they are the decoder's, while the mask that
    cross-attention is given knows the encoder only."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[int, int, int, torch.Tensor | None]] = {}

    def forget(self) -> None:
        """A new forward begins."""
        self._rows.clear()

    def placed(self, call: AttentionCall) -> AttentionCall:
        """The call itself, or a cross-attention with the rows of the self-attention before it."""
        mask, tower = call.mask, call.site.tower
        if call.site.kind == "self":
            self._rows[tower] = call.batch, call.n_queries, mask.q_start, mask.queries
            return call
        batch, n, start, queries = self._rows.get(tower, (0, 0, 0, None))
        if (batch, n) != (call.batch, call.n_queries):
            start, queries = 0, None
        start = mask.q_start if mask.causal or mask.window is not None else start
        return replace(call, mask=replace(mask, q_start=start, queries=queries))
