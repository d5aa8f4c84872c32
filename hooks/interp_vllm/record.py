"""Statistics of one request: a row for each token it generates, held until they are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from interp_vllm.settings import Asked

#: rows by which a record grows
GROWTH = 64


class Record:
    """What a request asked of every head, token by token.

    Row t is of the query whose output became generated token t. A position that the engine computes
    again (after it took a request's pages away) is not a second row.

    Args:
        asked: the statistics wanted.
        layers, heads: how many there are, of this rank.
        prompt: tokens of the prompt.
    """

    def __init__(self, asked: Asked, layers: int, heads: int, prompt: int) -> None:
        self.asked, self.layers, self.heads = asked, layers, heads
        #: the next position whose row is wanted
        self.next = max(prompt - 1, 0)
        #: rows that came after the record was full
        self.lost = 0
        self._positions: list[int] = []
        self._held: dict[str, Tensor] = {}

    def open(self, position: int) -> int | None:
        """The row of a position; None where none is wanted."""
        if position < self.next:
            return None
        self.next = position + 1
        if len(self._positions) >= self.asked.cap:
            self.lost += 1
            return None
        self._positions.append(position)
        return len(self._positions) - 1

    def note(self, row: int, layer: int, weights: Tensor) -> None:
        """Keeps what is asked of the weights (heads, keys) of a row in one layer."""
        for name, value in statistics(weights, self.asked).items():
            held = self._held.get(name)
            if held is None or len(held) <= row:
                held = self._grown(name, held, value, row)
            held[row, layer] = value.to(held)

    def _grown(self, name: str, held: Tensor | None, value: Tensor, row: int) -> Tensor:
        rows = max(GROWTH, 2 * row)
        dtype = torch.int32 if name == "topk_index" else torch.float32
        fill = -1 if name == "topk_index" else 0
        new = torch.full((rows, self.layers, *value.shape), fill, dtype=dtype)
        if held is not None:
            new[: len(held)] = held
        self._held[name] = new
        return new

    def take(self) -> dict[str, Tensor]:
        """The rows since they were last taken, which are then gone: `positions` (rows,), each
        statistic (rows, layers, heads, …), and `lost`, how many rows there was no room for."""
        n = len(self._positions)
        taken = {name: held[:n].clone() for name, held in self._held.items()}
        taken["positions"] = torch.tensor(self._positions, dtype=torch.int64)
        taken["lost"] = torch.tensor([self.lost])
        self._positions, self._held = [], {}
        return taken


def statistics(weights: Tensor, asked: Asked) -> dict[str, Tensor]:
    """What is asked of one row of attention (heads, keys).

    Example:
        >>> asked = Asked.read({"names": ["first", "off_sink"], "topk": 2})
        >>> found = statistics(torch.tensor([[0.7, 0.1, 0.2]]), asked)
        >>> [round(float(found[name]), 2) for name in ("first", "off_sink")]
        [0.7, 0.3]
        >>> found["topk_index"]
        tensor([[0, 2]])
    """
    found: dict[str, Tensor] = {}
    if "entropy" in asked.names:
        found["entropy"] = torch.special.entr(weights).sum(-1)
    if "first" in asked.names:
        found["first"] = weights[:, 0]
    if "off_sink" in asked.names:
        found["off_sink"] = weights[:, 1:].sum(-1)
    if "groups" in asked.names:
        masses = [weights[:, start:stop].sum(-1) for start, stop in asked.groups.values()]
        found["groups"] = torch.stack(masses, -1)  # (heads, groups)
    if "topk" in asked.names:
        n = min(asked.topk, weights.shape[1])
        prob, index = weights.topk(n, dim=-1)
        found["topk_index"] = torch.nn.functional.pad(index, (0, asked.topk - n), value=-1)
        found["topk_prob"] = torch.nn.functional.pad(prob, (0, asked.topk - n))
    return found
