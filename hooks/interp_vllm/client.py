"""What a user of an engine calls: settings for a request, and its statistics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp_vllm.errors import ServingError
from interp_vllm.settings import Asked, Settings

#: what a worker answers `collective_rpc` by, and a server at which path
TAKE, ROUTE = "interp_statistics", "/interp/statistics"


def asking(edits: Any = (), statistics: Any = None) -> dict[str, Any]:
    """`extra_args` of a request under edits, with statistics.

    Args:
        edits: edits of `interp.edits`, or their JSON form.
        statistics: names of `STATISTICS`, or an object as `Asked` has it.

    Raises:
        ServingError: what is no statistic, or no edit.

    Example:
        >>> asking([interp.edits.ScaleHeads({"L5H1": 0.0})], ["entropy"])["interp"][:39]
        '{"edits": [{"edit": "scale_heads", "gai'
    """
    several = list(edits) if isinstance(edits, (list, tuple)) else [edits]
    forms = [edit if isinstance(edit, dict) else _json(edit) for edit in several]
    asked = None if statistics is None else Asked.read(statistics)
    return {"interp": Settings(tuple(forms), asked).text()}


def _json(edit: Any) -> dict[str, Any]:
    if not hasattr(edit, "to_json"):
        raise ServingError(f"{edit!r} is no edit of interp.edits, nor its JSON form.")
    return dict(edit.to_json())


@dataclass(frozen=True)
class HeadStatistics:
    """Statistics of every head for each token that a request generated.

    Attributes:
        positions: (rows,) of the queries, in the sequence.
        lost: rows that there was no room for.
        values: `entropy`, `first`, `off_sink` (rows, layers, heads), `groups` (rows, layers, heads,
            groups), `topk_index` and `topk_prob` (rows, layers, heads, k).

    Example:
        >>> seen = HeadStatistics(torch.tensor([4, 5]), 0, {"first": torch.zeros(2, 3, 8)})
        >>> seen.first.shape
        torch.Size([2, 3, 8])
    """

    positions: Tensor
    lost: int
    values: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(
            f"These statistics have no {name}; they have {', '.join(values) or 'none'}."
        )

    def to_json(self) -> dict[str, Any]:
        """As a server hands them out; `from_json` reads them."""
        values = {name: value.tolist() for name, value in self.values.items()}
        return {"positions": self.positions.tolist(), "lost": self.lost, "values": values}

    @classmethod
    def from_json(cls, data: Any) -> HeadStatistics:
        """From what a server answered. Raises `ServingError` with its sentence where it has none.

        Example:
            >>> one = HeadStatistics(torch.tensor([4]), 0, {"first": torch.zeros(1, 2, 3)})
            >>> HeadStatistics.from_json(one.to_json()).first.shape
            torch.Size([1, 2, 3])
        """
        if not isinstance(data, dict) or "positions" not in data:
            said = data.get("error", data) if isinstance(data, dict) else data
            raise ServingError(f"The server has no statistics: {said}")
        values = {name: torch.tensor(value) for name, value in data["values"].items()}
        return cls(torch.tensor(data["positions"], dtype=torch.int64), int(data["lost"]), values)

    def copied(
        self, prompt: Sequence[int], generated: Sequence[int], span: tuple[int, int] | None = None
    ) -> Tensor:
        """(rows, layers, heads) bool: at this row the head's strongest key is a token of the prompt
        that is the one generated next: a retrieval head at work (Wu et al. 2024, arXiv
        2404.15574, section 2).

        Args:
            prompt, generated: token ids.
            span: (start, stop) positions that count, those of a needle; None for the whole prompt.

        Raises:
            ServingError: "topk" was not asked for, or rows that tokens are missing for.

        Example:
            >>> top = torch.tensor([[[[1]]], [[[0]]]])
            >>> seen = HeadStatistics(torch.tensor([2, 3]), 0, {"topk_index": top})
            >>> seen.copied([7, 8, 9], [8, 9]).flatten()
            tensor([ True, False])
        """
        if "topk_index" not in self.values:
            raise ServingError('Copied tokens are read off the strongest keys; ask for "topk".')
        tokens = torch.tensor([*prompt, *generated])
        if len(self.positions) and int(self.positions.max()) + 1 >= len(tokens):
            raise ServingError(
                f"The statistics have a row for position {int(self.positions.max())}, and with "
                f"{len(generated)} generated tokens nothing follows it; give all of them."
            )
        start, stop = (0, len(prompt)) if span is None else span
        strongest = self.values["topk_index"][..., 0].long()  # (rows, layers, heads)
        said = tokens[self.positions + 1][:, None, None]
        inside = (strongest >= start) & (strongest < min(stop, len(prompt)))
        return inside & (tokens[strongest.clamp_min(0)] == said)


def nothing_kept(request: str) -> str:
    """Why a request has no statistics."""
    return (
        f"Nothing is kept of request {request!r}: it asked for no statistics, or they were taken "
        "after it had finished."
    )


def joined(ranks: Sequence[bytes], request: str) -> HeadStatistics:
    """What the ranks of an engine kept of a request, heads in their order.

    Raises `ServingError` where nothing is kept.
    """
    from safetensors.torch import load

    if not ranks or not all(ranks):
        raise ServingError(nothing_kept(request))
    parts = [load(rank) for rank in ranks]
    common = {"positions", "lost"}
    values = {
        name: torch.cat([part[name] for part in parts], 2)
        for name in parts[0]
        if name not in common
    }
    return HeadStatistics(parts[0]["positions"], int(parts[0]["lost"]), values)


def statistics(llm: Any, request: str) -> HeadStatistics:
    """The statistics of a request since they were last taken; a finished request's are gone then.

    Args:
        llm: a `vllm.LLM`, or the address of a server, "http://localhost:8000", whose VLLM_PLUGINS
            names interp.
        request: its id, `output.request_id`, or the `id` of a server's answer.

    Raises:
        ServingError: nothing is kept of it, or the server does not answer.

    Example:
        >>> statistics(llm, outputs[0].request_id).entropy.shape  # doctest: +SKIP
        torch.Size([12, 30, 9])
    """
    if isinstance(llm, str):
        return HeadStatistics.from_json(_fetched(f"{llm.rstrip('/')}{ROUTE}/{request}"))
    found = joined(llm.collective_rpc(TAKE, args=(str(request),)), str(request))
    if not len(found.positions) and not found.lost:
        # an engine hears of the end of a request in its next step, and until then has no more rows
        raise ServingError(nothing_kept(str(request)))
    return found


def _fetched(address: str) -> Any:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise ServingError(f"{address} answers {error.code}: {text[:200]}") from error
    except OSError as error:
        raise ServingError(f"{address} does not answer: {error}.") from error
