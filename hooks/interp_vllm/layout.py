"""Where an engine's cache keeps the keys and values of a token: learnt from its own store.

The layout of a paged cache is private to the backend: on CPU vLLM keeps K transposed within a block
and V behind it, elsewhere it is packed for other units. Read wrongly, statistics are off without an
error. So numbers are written through the backend's own store into a few spare pages and looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp_vllm.errors import ServingError

#: writes keys and values (tokens, kv_heads, d) into the slots (tokens,) of a cache
Store = Callable[[Tensor, Tensor, Tensor, Tensor], None]
#: numbers that every dtype of a cache tells apart
DIGITS = 128


@dataclass(frozen=True)
class Layout:
    """Where the elements of a page are.

    Attributes:
        size: tokens a page.
        keys, values: (kv_heads, size, d) int64 places among the elements of a page.
        key_strides, value_strides: (start, kv head, slot, dimension) where these places are evenly
            spaced, so that a page is read as a view; None elsewhere.
    """

    size: int
    keys: Tensor
    values: Tensor
    key_strides: tuple[int, int, int, int] | None
    value_strides: tuple[int, int, int, int] | None

    def read_keys(self, cache: Tensor, blocks: Tensor) -> Tensor:
        """Keys (rows, pages, kv_heads, size, d) of each row's pages `blocks` (rows, pages), in
        their order."""
        return self._read(cache, blocks, self.keys, self.key_strides)

    def read_values(
        self, cache: Tensor, blocks: Tensor, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Values (rows, pages, kv_heads, size, d_v) of each row's pages, of which the first tokens
        count, as many as its length. Behind them they are 0: what lies in a page that is not full
        may be anything, and 0 · NaN is NaN. Without lengths they are as they lie."""
        values = self._read(cache, blocks, self.values, self.value_strides)
        if lengths is None:
            return values
        for row, length in zip(values, lengths, strict=True):
            page, slot = divmod(length, self.size)
            if page < len(row):
                row[page, :, slot:] = 0
                row[page + 1 :] = 0
        return values

    def _read(
        self, cache: Tensor, blocks: Tensor, places: Tensor, strides: tuple[int, ...] | None
    ) -> Tensor:
        return _taken(cache, blocks.flatten(), places, strides).unflatten(0, tuple(blocks.shape))

    def views(self, cache: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all pages (pages, kv_heads, size, d) where they lie; None where their
        places are not evenly spaced."""
        if self.key_strides is None or self.value_strides is None:
            return None
        return _view(cache, self.keys, self.key_strides), _view(
            cache, self.values, self.value_strides
        )


def _view(cache: Tensor, places: Tensor, strides: tuple[int, ...]) -> Tensor:
    """(pages, *places.shape) of a cache."""
    start = cache.storage_offset() + strides[0]
    return cache.as_strided((len(cache), *places.shape), (cache.stride(0), *strides[1:]), start)


def _taken(
    cache: Tensor, blocks: Tensor, places: Tensor, strides: tuple[int, ...] | None
) -> Tensor:
    """A copy of pages' elements at `places`; it lies as in the cache, which is the fastest."""
    if strides is None:
        pages = cache.index_select(0, blocks).flatten(1)  # (pages, elements)
        return pages[:, places.flatten()].view(len(pages), *places.shape)
    view, steps = _view(cache, places, strides), (0, *strides[1:])
    order = sorted(range(1, 4), key=lambda dim: -steps[dim])
    back = [1 + order.index(dim) for dim in range(1, 4)]
    return view.permute(0, *order).index_select(0, blocks).permute(0, *back)


def learn(cache: Tensor, kv_heads: int, d: int, d_v: int, store: Store) -> Layout:
    """The layout of a cache, proved on random numbers.

    Args:
        cache: the engine's own, pages first; it is not written to.
        kv_heads, d, d_v: of the keys and values that are stored.
        store: the backend's.

    Raises:
        ServingError: no such layout, or one that does not give back what was stored.
    """
    if cache.ndim < 2 or not len(cache) or not cache[0].is_contiguous():
        raise ServingError(
            f"The cache is of shape {tuple(cache.shape)}, and no pages are found in it; edits and "
            "statistics can't read keys there."
        )
    elements = cache[0].numel()
    size, rest = divmod(elements, kv_heads * (d + d_v))
    if rest or not size:
        raise ServingError(
            f"A page of the cache has {elements} elements, which {kv_heads} heads of keys ({d}) "
            f"and values ({d_v}) do not fill; edits and statistics can't read keys there."
        )
    tokens = 2 * size  # two pages, so that one that does not come second is seen
    places = _places(cache, tokens, kv_heads, d, d_v, store)
    keys, values = (_of_page(p, size, elements) for p in places)
    layout = Layout(size, keys, values, _strides(keys), _strides(values))
    _prove(layout, cache, kv_heads, d, d_v, store)
    return layout


def _spare(cache: Tensor) -> Tensor:
    """Two empty pages laid out as the cache's own."""
    return torch.zeros((2, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)


def _places(
    cache: Tensor, tokens: int, kv_heads: int, d: int, d_v: int, store: Store
) -> tuple[Tensor, Tensor]:
    """Where in two pages each element of keys (tokens, kv_heads, d) and of values lands.

    Every element is given a number of its own, written digit by digit, since half precision tells
    few numbers apart; what lies where is read off the pages.
    """
    n_keys, n = tokens * kv_heads * d, tokens * kv_heads * (d + d_v)
    numbers = torch.arange(1, n + 1, device=cache.device)  # 0 is an element that nothing wrote
    found = torch.zeros(2 * cache[0].numel(), dtype=torch.int64, device=cache.device)
    slots, weight = torch.arange(tokens, device=cache.device), 1
    while weight <= n:
        digit = (numbers // weight % DIGITS).to(cache.dtype)
        pages = _spare(cache)
        key = digit[:n_keys].view(tokens, kv_heads, d)
        store(key, digit[n_keys:].view(tokens, kv_heads, d_v), pages, slots)
        found += pages.flatten().round().to(torch.int64) * weight
        weight *= DIGITS
    place = torch.full((n + 1,), -1, dtype=torch.int64, device=cache.device)
    place[found.clamp(0, n)] = torch.arange(len(found), device=cache.device)
    place = place[1:]
    if bool((place < 0).any()) or len(place.unique()) < n:
        raise ServingError(
            "What the engine stores in its cache does not lie there element by element (a "
            "quantised or compressed cache); edits and statistics can't read keys there."
        )
    return place[:n_keys].view(tokens, kv_heads, d), place[n_keys:].view(tokens, kv_heads, d_v)


def _of_page(places: Tensor, size: int, elements: int) -> Tensor:
    """(kv_heads, size, d) places in a page, of those (2 · size, kv_heads, d) in two."""
    first, second = places[:size], places[size:]
    if bool((first >= elements).any()) or not bool((second - elements == first).all()):
        raise ServingError(
            f"Pages of the cache do not hold {size} tokens one after the other; edits and "
            "statistics can't read keys there."
        )
    return first.permute(1, 0, 2).contiguous()


def _strides(places: Tensor) -> tuple[int, int, int, int] | None:
    """(start, kv head, slot, dimension) of evenly spaced places; None for others."""
    start = int(places[0, 0, 0])
    steps = [
        int(places.select(dim, 1)[0, 0]) - start if n > 1 else 0
        for dim, n in enumerate(places.shape)
    ]
    even = torch.full((), start, dtype=torch.int64, device=places.device)
    for i, (n, step) in enumerate(zip(places.shape, steps, strict=True)):
        shape = [1] * places.ndim
        shape[i] = n
        even = even + step * torch.arange(n, device=places.device).view(shape)
    return (start, steps[0], steps[1], steps[2]) if bool((even == places).all()) else None


def _prove(layout: Layout, cache: Tensor, kv_heads: int, d: int, d_v: int, store: Store) -> None:
    """Raise `ServingError` unless random keys and values, stored in slots out of order, come back
    through `layout.read` as they were."""
    tokens, device = 2 * layout.size, cache.device
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(tokens, kv_heads, d, generator=generator).to(device, cache.dtype)
    value = torch.randn(tokens, kv_heads, d_v, generator=generator).to(device, cache.dtype)
    slots = torch.randperm(tokens, generator=generator).to(device)
    pages = _spare(cache)
    store(key, value, pages, slots)
    blocks = torch.tensor([[1, 0]], device=device)
    read = layout.read_keys(pages, blocks), layout.read_values(pages, blocks, [tokens])
    order = torch.argsort(slots)
    order = torch.cat([order[layout.size :], order[: layout.size]])  # pages 1, 0
    for got, given in zip(read, (key, value), strict=True):
        flat = got[0].permute(0, 2, 1, 3).reshape(tokens, kv_heads, -1)
        if not bool((flat == given[order]).all()):
            raise ServingError(
                "The cache does not give back what was stored in it, read as it was learnt to be; "
                "edits and statistics can't read keys there."
            )
