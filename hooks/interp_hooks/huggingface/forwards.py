"""What an open block knows of the forwards in it, and gives to each attention call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from interp_hooks.blocks import Tap
from interp_hooks.call import AttentionCall, Site
from interp_hooks.forward_notes import ForwardNotes
from interp_hooks.huggingface.generation import Generation
from interp_hooks.huggingface.images import ImageWatch, ids_and_before
from interp_hooks.huggingface.masks import QueryRows, real_tokens
from interp_hooks.huggingface.output_gate import Between, LateOutputs
from interp_hooks.huggingface.own_calls import RealTokens
from interp_hooks.huggingface.recompute import Checkpoints, Recomputed
from interp_hooks.huggingface.residual import StreamWatch
from interp_hooks.huggingface.tap import weights_wanted
from interp_hooks.prompt_tokens import PromptTokens

#: makes the surroundings of a layer that is run again
Recomputing = Callable[[Recomputed], AbstractContextManager[None]]


@dataclass
class Forwards:
    """The forwards of a block: the prompt's tokens and images, the stream that enters a layer, what
    `generate` and gradient checkpointing do around them.

    Attributes:
        module: the model.
        tap: whose block it is.
        images, tokens: of the prompt at hand.
        blocks: path of an attention of the main tower → the block it stands in.
        late: the attentions whose output waits for W_O.
    """

    module: Any
    tap: Tap
    images: ImageWatch
    tokens: PromptTokens
    blocks: Mapping[str, torch.nn.Module]
    between: Mapping[Site, Between]

    def __post_init__(self) -> None:
        tap = self.tap
        self.late, self._rows = LateOutputs(self.between), QueryRows()
        self._real = RealTokens(self.module)
        self._asked = False
        self._notes = ForwardNotes()
        self._streams = StreamWatch(lambda: any(edit.needs_hidden for edit in tap.edits))
        self._generation = Generation(lambda: bool(tap.observers))
        # with an encoder beside the decoder, input_ids are not what the main tower reads
        self._two_stacks = bool(getattr(self.module.config, "is_encoder_decoder", False))

    def __deepcopy__(self, memo: Any) -> Forwards:
        return self  # a model that is copied inside a block has these hooks, which ignore it

    @contextmanager
    def watching(self, recomputing: Recomputing) -> Iterator[None]:
        """Follow the model's forwards; its checkpointed layers run again in what `recomputing`
        makes."""

        def remember() -> Callable[..., AbstractContextManager[None]]:
            wanted = weights_wanted({})
            then = Recomputed.of(self.tap, self.tokens, self.images.mask, wanted)
            return lambda run, args: recomputing(replace(then, run=run, args=args))

        checkpoints = Checkpoints(self.module, remember)

        def begins(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            if module is not self.module:
                return
            self._asked = bool(kwargs.get("output_attentions"))
            # what a forward that failed left behind is forgotten
            for one in (self.late, self._rows, self._streams):
                one.forget()
            self._notes.begins()
            checkpoints.wrap()

        def ends(module: Any, args: tuple, output: Any) -> None:
            self._notes.ends()
            self._rows.forget()  # a compiled forward finds things as the one before did

        watches = [(self.module, begins), (self.module, self.images), (self.module, self._reads)]
        watches += [(self.module, self._real)]
        watches += [(block, self._streams) for block in set(self.blocks.values())]
        with ExitStack() as stack:
            for watched, watch in watches:
                stack.callback(watched.register_forward_pre_hook(watch, with_kwargs=True).remove)
            stack.callback(self.module.register_forward_hook(ends).remove)
            stack.enter_context(self.late)
            stack.enter_context(checkpoints)
            stack.enter_context(self._generation.watching(self.module))
            checkpoints.wrap()
            yield
            self._notes.ends()  # of parts of the model that were run by themselves

    @contextmanager
    def again(self, layer: Recomputed) -> Iterator[None]:
        """One layer is run again for its gradient."""
        block = layer.layer
        if block is not None and block in self.blocks.values():
            self._streams(block, layer.args, getattr(layer.run, "keywords", {}))
        with self.late:
            yield

    def _reads(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is not self.module:
            return
        if self._two_stacks or not any(edit.needs_tokens for edit in self.tap.edits):
            self.tokens.forget()
        else:
            ids, before = ids_and_before(args, kwargs)
            self.tokens.read(ids, before, real_tokens(kwargs.get("attention_mask")))

    @property
    def weights_asked(self) -> bool:
        """Whether the forward is to hand over its attention weights."""
        return self._asked or weights_wanted({})

    def described(self, call: AttentionCall) -> AttentionCall:
        """The call with what is known beside it."""
        site, call = call.site, self._rows.placed(self._padded(call))
        if site.is_main or site.kind == "cross":
            call = self._generation.call(call)
        if site.is_main:
            call = replace(call, images=self.images.mask)
        if site.is_main and self.tokens.prompt is not None:
            call = replace(call, tokens=self.tokens.prompt)
        hidden = self._streams.take(self.blocks.get(site.path))
        return replace(call, notes=self._notes, hidden=call.hidden if hidden is None else hidden)

    def _padded(self, call: AttentionCall) -> AttentionCall:
        """The call with its real rows, where the model made a mask of four dimensions itself, which
        tells which keys are hidden and not which rows are padding."""
        mask, site = call.mask, call.site
        if mask.dense is None or mask.queries is not None or site.kind != "self":
            return call
        tokens = self._real.of(site) if site.tower in ("", "text", "encoder") else None
        stop = mask.q_start + call.n_queries
        if tokens is None or tokens.shape[0] != call.batch or tokens.shape[1] != stop:
            return call
        if bool(tokens.all()):
            return call
        rows, starts = tokens[:, mask.q_start : stop], tokens.int().argmax(1)
        return replace(call, mask=replace(mask, queries=rows, starts=starts))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is run in this block leaves no trace in what is known."""
        mask, tokens = self.images.mask, self.tokens
        self.tokens = tokens.copy()
        try:
            with self._generation.aside():
                yield
        finally:
            self.images.mask, self.tokens = mask, tokens
