"""The engine's side: which requests are served, what a step runs of them, what they recorded."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from interp_vllm.attention import LayerTap
from interp_vllm.errors import ServingError
from interp_vllm.program import Program, compiled
from interp_vllm.record import Record
from interp_vllm.served import ServedModel
from interp_vllm.settings import Settings
from interp_vllm.step import Run, Step

#: finished requests whose statistics nobody has taken; older ones go
KEPT = 256
#: programs that wait for another request with the same settings
RECENT = 16


class Engine:
    """One rank of an engine whose heads are edited and read.

    It is told of a step before and after it (`begin`, `end`), and of each layer's attention in it
    (`at`).

    Args:
        model: the whole model.
        taps: its layers.
        runner: the engine's model runner: `requests`, id → its state, and `input_batch`, the ids of
            the requests in the order of their rows and how much of each is computed.
        rank, size: which of the ranks over which the heads are spread.
    """

    def __init__(
        self,
        model: ServedModel,
        taps: Sequence[LayerTap],
        runner: Any,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.model, self.taps, self.runner = model, list(taps), runner
        self.rank, self.size = rank, size
        self.served: dict[str, tuple[Program, Record | None] | None] = {}
        self.finished: OrderedDict[str, Record] = OrderedDict()
        self._programs: WeakValueDictionary[str, Program] = WeakValueDictionary()
        self._recent: deque[Program] = deque(maxlen=RECENT)
        self._scheduled: Mapping[str, int] | None = None
        self._step: Step | None = None

    def begin(self, scheduled: Mapping[str, int], finished: Sequence[str] = ()) -> None:
        """A step begins.

        Args:
            scheduled: request id → how many of its tokens run.
            finished: requests that are over.
        """
        for request in finished:
            self._finish(request)
        self._scheduled, self._step = scheduled, None
        for tap in self.taps:
            tap.calls = 0

    def end(self) -> None:
        """A step is over. Raises `ServingError` where layers ran unseen."""
        step, scheduled = self._step, self._scheduled or {}
        self._step, self._scheduled = None, None
        calls = {tap.calls for tap in self.taps}
        if calls == {1} or (step is not None and not step):
            return
        if step is not None or any(self._concerns(request) for request in scheduled):
            raise ServingError(
                f"In a step of the engine its {len(self.taps)} attention layers were seen "
                f"{min(calls)} to {max(calls)} times and not once each, so that edits would be "
                "left out; start the engine without CUDA graphs (enforce_eager=True)."
            )

    def _concerns(self, request: str) -> bool:
        state = self.runner.requests.get(request)
        return state is not None and self._program(request, state) is not None

    def at(self, tap: LayerTap, query: Tensor, cache: Tensor, metadata: Any, out: Tensor) -> None:
        """A layer's own kernel has written `out` (tokens, heads, d_v): edit it, read its cache."""
        if self._scheduled is None:  # a trial run without requests
            return
        tap.calls += 1
        if self._step is None:
            self._step = self._made(metadata)
        if self._step:
            tap.act(self._step, query, cache, metadata.block_table, out)

    def _made(self, metadata: Any) -> Step:
        assert self._scheduled is not None
        batch, requests, first = self.runner.input_batch, self.runner.requests, 0
        runs = []
        for index, request in enumerate(batch.req_ids):
            count = self._scheduled[request]
            state = requests[request]
            known = self._program(request, state)
            if known is not None:
                position = int(batch.num_computed_tokens_cpu[index])
                run = Run(index, first, count, position, state.num_prompt_tokens)
                _check_rows(run, metadata)
                runs.append((run, *known))
            first += count
        return Step(runs)

    def _program(self, request: str, state: Any) -> tuple[Program, Record | None] | None:
        """What a request asked, made when it is first seen."""
        if request in self.served:
            return self.served[request]
        params = getattr(state, "sampling_params", None)
        asked = (getattr(params, "extra_args", None) or {}).get("interp")
        known = None
        if asked is not None:
            program = self._compiled(asked)
            record = None
            if program.asked is not None:
                heads = self.taps[0].site.n_heads
                record = Record(program.asked, len(self.taps), heads, state.num_prompt_tokens)
            if program.changes or program.inside or record is not None:
                known = program, record
        self.served[request] = known
        return known

    def _compiled(self, asked: str) -> Program:
        """What requests with these settings do, made once: those that ask the same share it, so
        that their rows go together. It is kept while one of them runs, and the last few after."""
        program = self._programs.get(asked)
        if program is None:
            program = compiled(Settings.read(asked), self.model, self.rank, self.size)
            self._programs[asked] = program
            self._recent.append(program)
        return program

    def _finish(self, request: str) -> None:
        known = self.served.pop(request, None)
        if known is None or known[1] is None:
            return
        self.finished[request] = known[1]
        while len(self.finished) > KEPT:
            self.finished.popitem(last=False)

    def take(self, request: str) -> dict[str, Tensor] | None:
        """The statistics of a request since they were last taken, by the id that its user knows;
        None where nothing is kept of it. A finished request's are gone then."""
        for name, known in self.served.items():
            if known is not None and known[1] is not None and _same(name, request):
                return known[1].take()
        for name in reversed(self.finished):
            if _same(name, request):
                return self.finished.pop(name).take()
        return None


def _same(internal: str, request: str) -> bool:
    """Whether the engine's id, the user's with eight characters behind it, is of this request."""
    return internal == request or internal.rpartition("-")[0] == request


def _check_rows(run: Run, metadata: Any) -> None:
    """Raise `ServingError` where the attention's own tables say otherwise. On a device looking
    would wait for it."""
    starts, lengths = metadata.query_start_loc, metadata.seq_lens
    if not isinstance(starts, torch.Tensor) or starts.device.type != "cpu":
        return
    stop = run.position + run.count
    if int(starts[run.index]) != run.first or int(lengths[run.index]) != stop:
        raise ServingError(
            f"The engine's tables put a request at rows {int(starts[run.index])} of a sequence of "
            f"{int(lengths[run.index])} tokens, its batch at row {run.first} of {stop}; edits "
            "would act on other rows."
        )
