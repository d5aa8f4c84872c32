"""What happens at one attention layer of an engine, after its own kernel has run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp_hooks.blocks import Tap
from interp_hooks.call import AttentionCall, Site
from interp_hooks.engine import attend, rewritten, steers_of
from interp_kernels import Mask
from interp_kernels.paged import RowChange, row_change
from interp_vllm.errors import ServingError
from interp_vllm.layout import Layout
from interp_vllm.rows import alike, joined, own_pages, rows_over
from interp_vllm.step import Part, Step

#: how far the engine's own output may be from one computed anew from its cache, by dtype, of the
#: largest number in it
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: more keys than any cache holds: spans of an edit end where a row does
ALL_KEYS = 1 << 30


@dataclass
class LayerTap:
    """One layer as its attention is seen: its place, its scale, and how its cache is read.

    Attributes:
        row: which of the model's attention layers, from 0.
        site: of this rank's heads.
        scale: logits = scale·q·k.
        layout: of the cache.
        proved: whether the engine's output was once the one that its cache gives.
        calls: how often it ran in this step.
    """

    row: int
    site: Site
    scale: float
    layout: Layout
    proved: bool = False
    calls: int = 0

    def act(self, step: Step, query: Tensor, cache: Tensor, table: Tensor, output: Tensor) -> None:
        """Edits the output (tokens, heads, d_v) of a step in place, and keeps its statistics.

        Args:
            step: what runs.
            query: (tokens, heads, d).
            cache: the layer's pages, first.
            table: (requests, pages) int, the pages of each request in their order.
            output: what the engine's own kernel gave.

        Raises:
            ServingError: the first time, where the cache does not give that output.
        """
        groups: dict[tuple[int, ...], list[Part]] = {}
        acting: dict[tuple[int, ...], list[Any]] = {}
        for part in step.parts:
            edits = part.program.edits(self.site, part.position, part.generated)
            if part.count > 1:
                if edits:
                    self._rows(part, edits, query, cache, table, output)
            elif edits or part.record is not None:
                key = tuple(map(id, edits))  # requests that ask the same share their edits
                if any(getattr(edit, "rule", None) for edit in edits):
                    key += (part.position,)  # these go by position
                groups.setdefault(key, []).append(part)
                acting[key] = edits
        each = 2 * self.site.n_kv_heads * self.site.d_head + 4 * self.site.n_heads
        for key, parts in groups.items():
            for some in alike(parts, each):
                self._singles(some, acting[key], query, cache, table, output)
        for patch in step.patches:
            if self.row not in patch.layers:
                continue
            rows = output[patch.first : patch.stop]
            rows.mul_(patch.gain[self.row].to(rows))
            if patch.offset is not None:
                rows.add_(patch.offset[self.row].to(rows))

    def _singles(
        self,
        parts: Sequence[Part],
        edits: Sequence[Any],
        query: Tensor,
        cache: Tensor,
        table: Tensor,
        output: Tensor,
    ) -> None:
        """Single rows under the same edits: dense, and their statistics with them."""
        places = [part.first for part in parts]
        tables = table[[part.index for part in parts]]
        lengths = [part.position + 1 for part in parts]
        q, own = query[places], output[places]  # (rows, heads, d)
        rows = rows_over(self.layout, cache, tables, lengths, self.scale, q)
        if not self.proved:
            self._prove(own, rows.output(q))
        before: list[tuple[int, Part]] = []
        after: list[tuple[int, Part]] = []
        for i, part in enumerate(parts):
            if part.record is not None:
                early = part.record[0].asked.stage == "before" or not edits
                (before if early else after).append((i, part))
        for i, part in before:
            self._note(part, rows.weights(q)[i, :, : lengths[i]])
        if not edits:
            return
        change, asked = self._change(parts[0], edits, q[0]), self._query(parts, edits, q)
        if asked is q and not after:
            output[places] = rows.changed(q, own, change).to(output)
            return
        shown = rows.weights(asked, change) if after else None
        output[places] = rows.output(asked, change).to(output)
        for i, part in after:
            assert shown is not None
            self._note(part, shown[i, :, : lengths[i]])

    def _note(self, part: Part, weights: Tensor) -> None:
        assert part.record is not None
        record, row = part.record
        record.note(row, self.row, weights)

    def _rows(
        self,
        part: Part,
        edits: Sequence[Any],
        query: Tensor,
        cache: Tensor,
        table: Tensor,
        output: Tensor,
    ) -> None:
        """Several rows: through the kernels, as a model of transformers goes."""
        length = part.position + part.count
        blocks = own_pages(table[part.index : part.index + 1], [length], self.layout.size)
        rows = slice(part.first, part.first + part.count)
        q = query[rows].transpose(0, 1)[None]  # (1, heads, queries, d)
        call = AttentionCall(
            self.site,
            q,
            joined(self.layout.read_keys(cache, blocks))[:, :, :length],
            joined(self.layout.read_values(cache, blocks, [length]))[:, :, :length],
            Mask(q_start=part.position),
            self.scale,
        )
        if not self.proved:
            self._prove(output[rows], attend(call, Tap())[0])
        output[rows] = attend(call, Tap(edits=edits))[0].to(output)

    def _prove(self, own: Tensor, ours: Tensor) -> None:
        """Raise `ServingError` unless the engine's output is the one that its cache gives."""
        bound = CLOSE.get(own.dtype, 5e-2) * max(1.0, float(own.float().abs().max()))
        far = float((own.float() - ours.float()).abs().max())
        if not far <= bound:
            raise ServingError(
                f"At {self.site.place} the engine's attention differs by {far:.2g} from the one "
                "that its cache gives, so that edits and statistics would be of something else; "
                "this attention backend is not understood."
            )
        self.proved = True

    def _call(self, part: Part, q: Tensor, keys: int) -> AttentionCall:
        """A call of one row whose keys are counted and not read."""
        site = self.site
        none = q.new_empty(()).expand(1, site.n_kv_heads, keys, site.d_head)
        return AttentionCall(
            site, q[None, :, None], none, none, Mask(q_start=part.position), self.scale
        )

    def _query(self, parts: Sequence[Part], edits: Sequence[Any], q: Tensor) -> Tensor:
        """The rows' queries (rows, heads, d) as the edits leave them."""
        if not any(getattr(edit, "mode", None) == "uniform" for edit in edits):
            return q
        left = []
        for part, row in zip(parts, q, strict=True):
            call = rewritten(self._call(part, row, part.position + 1), edits)
            assert call.query is not None
            left.append(call.query[0, :, 0])
        return torch.stack(left)

    def _change(self, part: Part, edits: Sequence[Any], q: Tensor) -> RowChange:
        """What the edits do to the row's logits. It is the same for all rows, but where an edit
        goes by position."""
        known = part.program.rows.setdefault(self.row, {})
        fixed = not any(getattr(edit, "rule", None) for edit in edits)
        key = tuple(map(id, edits))  # they live as long as their program
        if fixed and key in known:
            return known[key]
        steers = steers_of(self._call(part, q, ALL_KEYS), edits, _no_answer)
        change = row_change([one.steer for one in steers], self.site.n_heads)
        if change is None:
            raise ServingError(
                f"The edits of a request can't act together at {self.site.place} inside an engine; "
                "send one of them."
            )
        if fixed:
            known[key] = change
        return change


def _no_answer(*_: Any) -> Any:
    raise ServingError(
        "An edit that asks for the weights of a row before it acts is not served inside an engine."
    )
