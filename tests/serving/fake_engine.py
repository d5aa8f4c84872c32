"""A stand-in for a serving engine: a cache in pages, its attention, its batches; no vLLM.

It keeps the contract that `interp_vllm` relies on: `do_kv_cache_update` and `forward` of an
attention implementation, the metadata of a step, and a model runner's requests and batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from interp_vllm.attention import LayerTap
from interp_vllm.engine import Engine
from interp_vllm.layout import learn
from interp_vllm.served import ServedModel
from interp_vllm.worker import seen, stepped

#: how a page may be laid out
KINDS = ("turned", "slots", "packed")


class PagedAttention:
    """Attention over pages of `size` tokens in one of three private layouts: "turned" (a head's K
    transposed, V behind it, as on CPU), "slots" (token by token), "packed" (K in pairs of
    dimensions, which no strides describe)."""

    def __init__(self, kind: str, heads: int, kv_heads: int, d: int, size: int, pages: int) -> None:
        self.kind, self.heads, self.kv_heads, self.d, self.size = kind, heads, kv_heads, d, size
        self.scale = d**-0.5
        shape: tuple[int, ...] = (pages, kv_heads, size, 2 * d)
        if kind == "slots":
            shape = (pages, size, 2, kv_heads, d)
        self.cache = torch.full(shape, torch.nan)  # what nobody wrote must not be read

    def _page(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """Views (kv_heads, size, d) of a page; K of "packed" is unpacked by `_unpacked`."""
        n, d = self.size, self.d
        if self.kind == "slots":
            return page[:, 0].transpose(0, 1), page[:, 1].transpose(0, 1)
        flat = page.view(self.kv_heads, 2 * n * d)
        key, value = flat[:, : n * d], flat[:, n * d :].view(self.kv_heads, n, d)
        if self.kind == "turned":
            return key.view(self.kv_heads, d, n).transpose(1, 2), value
        pairs = key.view(self.kv_heads, d // 2, n, 2)  # (kv_heads, pair, slot, 2)
        return pairs, value

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        for token, slot in enumerate(slots.tolist()):
            keys, values = self._page(cache[slot // self.size])
            at = slot % self.size
            if self.kind == "packed":
                keys[:, :, at] = key[token].view(self.kv_heads, self.d // 2, 2)
            else:
                keys[:, at] = key[token]
            values[:, at] = value[token]

    def read(self, cache: Tensor, pages: list[int], length: int) -> tuple[Tensor, Tensor]:
        """(kv_heads, length, d) keys and values."""
        keys, values = [], []
        for page in pages:
            k, v = self._page(cache[page])
            if self.kind == "packed":
                k = k.permute(0, 2, 1, 3).reshape(self.kv_heads, self.size, self.d)
            keys.append(k)
            values.append(v)
        return torch.cat(keys, 1)[:, :length], torch.cat(values, 1)[:, :length]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
    ) -> Tensor:
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        for i, length in enumerate(lengths):
            a, b = starts[i], starts[i + 1]
            pages = attn_metadata.block_table[i, : -(-length // self.size)].tolist()
            k, v = self.read(kv_cache, pages, length)
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, 0) for x in (k, v))
            s = self.scale * query[a:b].transpose(0, 1) @ k.transpose(1, 2)
            hidden = torch.ones(b - a, length, dtype=torch.bool).triu(length - (b - a) + 1)
            s = s.masked_fill(hidden, -torch.inf)
            output[a:b] = (s.softmax(-1) @ v).transpose(0, 1)
        return output


@dataclass
class Sequence:
    """One request: q, k, v (layers, tokens, heads or kv_heads, d), and what its engine knows."""

    name: str
    prompt: int
    query: Tensor
    key: Tensor
    value: Tensor
    settings: str | None
    pages: list[int] = field(default_factory=list)
    done: int = 0
    out: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompt

    @property
    def sampling_params(self) -> Any:
        extra = None if self.settings is None else {"interp": self.settings}
        return SimpleNamespace(extra_args=extra)


class FakeEngine:
    """Runs sequences in steps of mixed requests, tapped as a worker taps vLLM's.

    The `rank` of `size` holds its share of the heads.
    """

    def __init__(
        self,
        model: ServedModel,
        kind: str,
        page: int,
        rank: int = 0,
        size: int = 1,
        pages: int = 128,
    ) -> None:
        self.model, self.mine, self.page = model, model.rank(rank, size), page
        self.heads = slice(rank * self.mine.n_heads, (rank + 1) * self.mine.n_heads)
        self.kv = slice(rank * self.mine.n_kv_heads, (rank + 1) * self.mine.n_kv_heads)
        mine = self.mine
        self.layers = [
            PagedAttention(kind, mine.n_heads, mine.n_kv_heads, mine.d_head, page, pages)
            for _ in model.layers
        ]
        self.free = list(range(pages))[::-1]
        self.requests: dict[str, Sequence] = {}
        self.input_batch = SimpleNamespace(req_ids=[], num_computed_tokens_cpu=[])
        layout = learn(
            self.layers[0].cache,
            mine.n_kv_heads,
            mine.d_head,
            mine.d_head,
            lambda k, v, c, s: self.layers[0].do_kv_cache_update(None, k, v, c, s),
        )
        taps = [
            LayerTap(row, mine.site(number), mine.d_head**-0.5, layout)
            for row, number in enumerate(model.layers)
        ]
        self.engine = Engine(model, taps, self, rank, size)
        for tap, layer in zip(taps, self.layers, strict=True):
            layer.forward = seen(self.engine, tap, layer.forward)  # type: ignore[method-assign]
        self.execute_model = stepped(self.engine, self.execute_model)  # type: ignore[method-assign]
        self.blind: set[int] = set()

    def add(self, sequence: Sequence) -> None:
        self.requests[sequence.name] = sequence

    def preempt(self, name: str) -> None:
        """A request's pages are taken away; it will be computed again."""
        one = self.requests[name]
        self.free += one.pages
        one.pages, one.done = [], 0

    def step(self, counts: dict[str, int], finished: tuple[str, ...] = ()) -> None:
        """Runs so many further tokens of each named request."""
        self.execute_model(
            SimpleNamespace(num_scheduled_tokens=counts, finished_req_ids=set(finished))
        )

    def execute_model(self, scheduler_output: Any) -> None:
        counts = scheduler_output.num_scheduled_tokens
        for name in scheduler_output.finished_req_ids:
            self.free += self.requests.pop(name).pages
        if not counts:
            return
        batch = [self.requests[name] for name in counts]
        self.input_batch.req_ids = list(counts)
        self.input_batch.num_computed_tokens_cpu = [one.done for one in batch]
        slots, starts, lengths = [], [0], []
        for one in batch:
            stop = one.done + counts[one.name]
            while len(one.pages) * self.page < stop:
                one.pages.append(self.free.pop())
            slots += [
                one.pages[p // self.page] * self.page + p % self.page for p in range(one.done, stop)
            ]
            starts.append(starts[-1] + counts[one.name])
            lengths.append(stop)
        table = torch.zeros(len(batch), max(len(one.pages) for one in batch), dtype=torch.int32)
        for i, one in enumerate(batch):
            table[i, : len(one.pages)] = torch.tensor(one.pages)
        metadata = SimpleNamespace(
            query_start_loc=torch.tensor(starts),
            seq_lens=torch.tensor(lengths),
            block_table=table,
        )
        for row, layer in enumerate(self.layers):
            rows = [slice(one.done, one.done + counts[one.name]) for one in batch]
            q, k, v = (
                torch.cat([getattr(one, n)[row, at] for one, at in zip(batch, rows, strict=True)])
                for n in ("query", "key", "value")
            )
            q, k, v = q[:, self.heads], k[:, self.kv], v[:, self.kv]
            layer.do_kv_cache_update(None, k, v, layer.cache, torch.tensor(slots))
            out = torch.full((starts[-1] + 3, *q.shape[1:]), 7.0)  # padded, as graphs are
            if row in self.blind:  # a graph replays, and no Python runs
                continue
            layer.forward(None, q, k, v, layer.cache, metadata, out)
            assert bool((out[starts[-1] :] == 7).all())
            for i, one in enumerate(batch):
                for p in range(counts[one.name]):
                    one.out[row, one.done + p] = out[starts[i] + p].clone()
        for one in batch:
            one.done += counts[one.name]


def sequence(
    name: str,
    model: ServedModel,
    prompt: int,
    total: int,
    settings: str | None = None,
    seed: int = 0,
) -> Sequence:
    """Random queries, keys and values of a request."""
    generator = torch.Generator().manual_seed(seed)
    n = len(model.layers)

    def draw(heads: int) -> Tensor:
        return torch.randn(n, total, heads, model.d_head, generator=generator)

    query = 2 * draw(model.n_heads)
    return Sequence(name, prompt, query, draw(model.n_kv_heads), draw(model.n_kv_heads), settings)
