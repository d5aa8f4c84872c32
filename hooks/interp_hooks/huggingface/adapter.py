"""HuggingFace models behind `HookedModel`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from interp_hooks.activations import Hook, Residual
from interp_hooks.adapter import Adapter
from interp_hooks.blocks import undisturbed
from interp_hooks.call import AttentionCall, Site
from interp_hooks.engine import Tap, attend, begin, explain_call
from interp_hooks.errors import TapError
from interp_hooks.head_weights import HeadWeights
from interp_hooks.huggingface import own_attention, positions
from interp_hooks.huggingface.call_map import FirstInput, call_maps
from interp_hooks.huggingface.called import Turns
from interp_hooks.huggingface.context import max_context
from interp_hooks.huggingface.discovery import attempt
from interp_hooks.huggingface.finding import block_path, found_sites
from interp_hooks.huggingface.forwards import Forwards
from interp_hooks.huggingface.images import ImageWatch, image_token
from interp_hooks.huggingface.layout import (
    DEFAULT,
    Layout,
    check_names,
    position_table,
    text_config,
)
from interp_hooks.huggingface.linear_map import linear_map, stored
from interp_hooks.huggingface.output_gate import Between
from interp_hooks.huggingface.own_calls import keeping_weights
from interp_hooks.huggingface.projections import projecting
from interp_hooks.huggingface.proof import Parts, Unexplained, Watched, WrongLayout, watching
from interp_hooks.huggingface.recompute import Recomputed, recomputed_elsewhere
from interp_hooks.huggingface.residual import capture
from interp_hooks.huggingface.shards import sharded
from interp_hooks.huggingface.tap import check_attentions, installed
from interp_hooks.huggingface.weights import head_weights
from interp_hooks.norms import Norms, find
from interp_hooks.prompt_tokens import PromptTokens
from interp_hooks.routes import table
from interp_hooks.shared_attention import attend_shared
from interp_hooks.vocabulary import Embeddings
from interp_hooks.wrapping import eagerly, evaluating, inner, refuse_noise, refuse_virtual_tokens


class HFAdapter(Adapter):
    """A `transformers` model, tapped through `AttentionInterface`, or (`own`) where its modules
    compute attention themselves: `plain` by the operations, else in the way that it has chosen
    (torch's fused attention, which some architectures give other masks)."""

    def __init__(
        self,
        module: Any,
        sample: dict[str, torch.Tensor],
        layout: Layout = DEFAULT,
        own: bool = False,
        plain: bool = True,
    ):
        self.module, self._sample, self._layout = module, sample, layout
        self._own, self._plain = own, plain
        self.images = ImageWatch(module.config)
        self._forwards: Forwards | None = None  # of the blocks that are open
        refuse_virtual_tokens(module)
        self._inner = inner(module)  # under PEFT, the model whose forward is run
        self.accepts = frozenset(inspect.signature(self._inner.forward).parameters)
        extra = dict(use_cache=False) if "use_cache" in self.accepts else {}
        with torch.no_grad(), undisturbed(module):
            run = partial(module, **sample, **extra)
            found = found_sites(module, run, layout, own, sample, plain)
        self.sites = [site for site, _ in found]
        self._modules = {(s.tower, s.kind, s.layer): f.module for s, f in found}
        # where something stands between softmax·v and W_O, z is what W_O reads
        self._between: dict[Site, Between] = {s: f.between for s, f in found if f.between}
        # a module that stands for several layers has several sites, in order of its calls
        self._turns: dict[int, list[Site]] = {}
        # what a module attends with beside its main stream is a site of its own
        self._streams = {id(f.module): s for s, f in found if f.stream}
        for site, f in found:
            if not f.stream:
                self._turns.setdefault(id(f.module), []).append(site)
        # what makes q, k, v and reads z at each site, or why that is not known (check on load)
        self.parts: dict[Site, Parts] = {}
        self._watched: dict[Site, Watched] = {}  # attentions under watch now
        self._checked: dict[Site, Watched] = {}  # those of the check on load
        check_names(module, layout)
        self._positions, self._takes_positions = positions.Habit(), False
        self._settle_positions()
        self.max_context = max_context(text_config(module))

    def _settle_positions(self) -> None:
        """Learn how the model counts positions that are not rotary."""
        ids, takes = self._sample.get("input_ids"), "position_ids" in self.accepts
        if ids is None or set(self._sample) - {"input_ids", "attention_mask"}:
            return
        unlearned = self.position_table is None
        if unlearned and (not takes or positions.rotary(self.module, text_config(self.module))):
            return
        extra = dict(use_cache=False) if "use_cache" in self.accepts else {}
        after_padding = (getattr(text_config(self.module), "pad_token_id", None) or 0) + 1
        self._positions = positions.habit(
            lambda **inputs: self.module(**inputs, **extra), ids[:1], takes, (0, after_padding)
        )
        self._takes_positions = takes
        if self._positions.first != 0:  # positions from 0 would be wrong ones
            self.accepts -= {"position_ids"}

    def anchors(self) -> Sequence[tuple[torch.nn.Module, Hashable]]:
        beside = {(s.tower, s.kind, s.layer) for s in self._streams.values()}
        return [(module, name) for name, module in self._modules.items() if name not in beside]

    def forward(self, *args: Any, **inputs: Any) -> Any:
        if args:
            inputs["input_ids"] = args[0]
        refuse_virtual_tokens(self.module)
        inputs = self._placed(inputs)
        mask = inputs.get("attention_mask")
        if mask is None:
            inputs.pop("attention_mask", None)
        elif self._positions.counts_padding and inputs.get("position_ids") is None:
            counted = positions.of_mask(inputs)
            if counted is not None and self._takes_positions:
                inputs["position_ids"] = counted + (self._positions.first or 0)
            elif counted is not None and self.position_table is not None:
                with positions.reading(self.module.get_submodule(self.position_table), counted):
                    return self.module(**inputs)
        return self.module(**inputs)

    def generate(self, **inputs: Any) -> torch.Tensor:
        refuse_virtual_tokens(self.module)
        static = inputs.get("cache_implementation") is not None  # it may compile its steps
        with eagerly(certain=static):
            return self.module.generate(**self._placed(inputs))

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Tensors where the model reads them."""
        return {
            k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
        }

    @contextmanager
    def installed(self, tap: Tap) -> Iterator[None]:
        refuse_noise(self.module)
        with self._tapped(tap):
            yield

    @contextmanager
    def _tapped(
        self,
        tap: Tap,
        note: Callable[[AttentionCall], None] | None = None,
        again: Recomputed | None = None,
    ) -> Iterator[None]:
        """Every attention call goes to the tap, or to `note` and its attention is computed plainly
        (edits that are for another input can be explained so). In the main tower it knows which
        tokens are an image's, and, where an edit of the tap needs it, the stream that entered its
        layer and the prompt's tokens. `again`: for a layer that is recomputed for its gradient."""
        tokens = again.tokens if again else PromptTokens()
        blocks = {
            s.path: self.module.get_submodule(path)
            for s in self._main_sites()
            if (path := self._block_path(s))
        }
        forwards = Forwards(self._inner, tap, self.images, tokens, blocks, self._between)

        def told(call: AttentionCall) -> torch.Tensor:
            if call.site in self._watched and call.query is not None:
                self._watched[call.site].called(call)
            call = forwards.described(call)
            if again is not None and again.weights and call.weights is None:
                call = replace(call, weights=lambda weights: None)
            elif self._own and call.weights is None and forwards.weights_asked:
                call = keeping_weights(call)
            if again is None and recomputed_elsewhere(call, tap):
                return attend(call, Tap())
            if note is not None:
                note(call)
            does = tap if note is None else Tap()
            if call.shards is not None and call.site not in self._between:
                return attend_shared(call, does)
            if call.shards is not None:
                raise TapError(
                    f"The heads of {type(self.module).__name__} are shared out over processes and "
                    "gated before W_O, which is not understood here; load it in one process."
                )
            if call.site in self._between:
                return forwards.late.keep(begin(call, does, late=True))
            return attend(call, does)

        turns = self._counting()
        live: dict[int, tuple[Site, Callable[[AttentionCall], torch.Tensor]]] = {}
        for attention in self._modules.values():
            places = self._turns[id(attention)]

            def here(call: AttentionCall, m: Any = attention, s: Any = places) -> torch.Tensor:
                if again is not None and tap.edits:
                    raise TapError(
                        "Layers that share one module can't be told apart when gradient "
                        "checkpointing runs them again, so edits are refused; turn it off."
                    )
                return told(replace(call, site=s[turns.turn(m)]))

            live[id(attention)] = (places[0], here if len(places) > 1 else told)
        install: Any = installed
        if self._own:
            install = partial(own_attention.installed, plain=self._plain, streams=self._streams)
        over = note is not None or again is not None
        outer, self._forwards = self._forwards, forwards
        with ExitStack() as stack:
            stack.enter_context(eagerly())
            stack.enter_context(turns)
            stack.callback(setattr, self, "_forwards", outer)
            if again is None:
                stack.enter_context(forwards.watching(self._recomputing))
            else:
                stack.enter_context(forwards.again(again))
            answered = self._inner.register_forward_hook(check_attentions, with_kwargs=True)
            stack.callback(answered.remove)
            stack.enter_context(install(self.module, live, over))
            yield

    def _counting(self) -> Turns:
        """Which of its layers a shared module stands for now."""
        return Turns(self.module, {key: len(sites) for key, sites in self._turns.items()})

    @contextmanager
    def _recomputing(self, again: Recomputed) -> Iterator[None]:
        """A checkpointed layer is run again, under the edits of its first run; nobody hears it."""
        mask, self.images.mask = self.images.mask, again.images
        try:
            with self._tapped(again.tap, again=again):
                yield
        finally:
            self.images.mask = mask

    @contextmanager
    def aside(self) -> Iterator[None]:
        with nullcontext() if self._forwards is None else self._forwards.aside():
            yield

    @contextmanager
    def residual(self, write: Hook | None, keep: bool = True) -> Iterator[Residual]:
        with (
            eagerly(),
            capture(self.blocks(), self.final_norm(), write, keep, self._layout) as residual,
        ):
            yield residual

    @contextmanager
    def projections(self, hook: Hook) -> Iterator[None]:
        parts = [(s, self.parts.get(s, {})) for s in self._main_sites()]
        with eagerly(), projecting(parts, hook):
            yield

    @property
    def position_table(self) -> str | None:
        return position_table(self.module, self._layout)

    @contextmanager
    def outputs(self) -> Iterator[dict[Site, torch.Tensor]]:
        by_site: dict[Site, torch.Tensor] = {}

        turns = self._counting()

        def hook(module: Any, args: Any, output: Any) -> None:
            site = self._turns[id(module)][turns.turn(module)]
            by_site[site] = _first(output)

        with turns, ExitStack() as stack:
            stack.enter_context(self._watching(self.sites))
            for attention in {id(m): m for m in self._modules.values()}.values():
                stack.callback(attention.register_forward_hook(hook).remove)
            yield by_site
            if self.parts:  # what the check on load proved stands
                return
            self._checked = dict(self._watched)
            self.parts = {site: dict(one.parts) for site, one in self._watched.items()}

    @contextmanager
    def _watching(self, sites: Sequence[Site], keep: bool = False) -> Iterator[dict[Site, Watched]]:
        """Attentions under watch in the forwards of a block."""
        outer = self._watched
        modules = [(site, self.attention_module(site), self._around(site)) for site in sites]
        try:
            with watching(modules, self._layout, keep) as self._watched:
                yield self._watched
        finally:
            self._watched = outer

    def _around(self, site: Site) -> torch.nn.Module:
        """The module that an attention stands in."""
        return self.module.get_submodule(site.path.rpartition(".")[0])

    def _beside_streams(self) -> list[Site]:
        """The sites whose modules attend with other streams as well."""
        return [s for key in self._streams for s in self._turns[key]]

    def compare_output(self, site: Site, z: torch.Tensor, out: torch.Tensor, most: float) -> None:
        parts = self.parts[site]
        if site in self._beside_streams():
            out = out[:, : z.shape[1]]  # the main stream comes first
        parts["z"] = self._checked.pop(site).output(z, out, most)

    def blocks(self) -> dict[int, torch.nn.Module]:
        """The block of each layer of the main tower, those without attention too where they stand
        in one list and are numbered so."""
        sites = self._main_sites()
        paths = {s.layer: self._block_path(s) for s in sites}
        if len(set(paths.values())) < len(sites) or "" in paths.values():
            raise TapError(
                f"The layers of {type(self.module).__name__} are not one block each, so its "
                "residual stream can't be told layer by layer."
            )
        lists = {path.rpartition(".")[0] for path in paths.values()}
        if len(lists) == 1 and all(path.endswith(f".{n}") for n, path in paths.items()):
            found = self.module.get_submodule(lists.pop())
            if isinstance(found, torch.nn.ModuleList):
                return dict(enumerate(found))
        return {layer: self.module.get_submodule(path) for layer, path in paths.items()}

    def final_norm(self) -> torch.nn.Module | None:
        """The norm before the unembedding, if there is one."""
        trunk = self.module.get_submodule(
            ".".join(self._block_path(self._main_sites()[0]).split(".")[:-2])
        )
        return self._layout.find(trunk, "final_norm")

    def _block_path(self, site: Site) -> str:
        return block_path(site, self._main_sites())

    def _main_sites(self) -> list[Site]:
        return [s for s in self.sites if s.kind == "self" and s.tower in ("", "text")]

    def attention_module(self, site: Site) -> torch.nn.Module:
        """The attention module at a site."""
        return self._modules[(site.tower, site.kind, site.layer)]

    def output_projection(self, site: Site) -> torch.nn.Module:
        part = self.parts.get(site, {}).get("z", "it was not seen in the check on load")
        if isinstance(part, str):
            raise TapError(
                f"The output projection of {site.place} is not known to this toolkit: {part}."
            )
        if sharded(part.projection) is not None:
            raise TapError(
                f"The output projection of {site.place} is shared out over processes, so it is no "
                "module to be written to; load the model in one process."
            )
        return part.projection

    def head_weights(self, site: Site) -> HeadWeights:
        unseen = dict.fromkeys("qkvz", "it was not seen in the check on load")
        parts: dict[str, Any] = unseen | self.parts.get(site, {})
        unknown = [part for part in parts.values() if isinstance(part, str)]
        with evaluating(self.module), eagerly():
            if unknown and not any(isinstance(part, WrongLayout) for part in unknown):
                parts |= {
                    place: part
                    for place, part in self._call_maps(site).items()
                    if isinstance(parts[place], Unexplained)
                }
            return head_weights(site, parts)

    @torch.no_grad()
    def _call_maps(self, site: Site) -> dict[str, Any]:
        """place → (matrix, bias) of the whole way from what an attention reads to its call, where
        that is a linear map, as the model's own numbers say."""
        ids = self._sample.get("input_ids")
        if ids is None or set(self._sample) - {"input_ids", "attention_mask"} or not site.is_main:
            return {}
        extra = dict(use_cache=False) if "use_cache" in self.accepts else {}
        with (
            self.aside(),
            self._tapped(Tap(), lambda call: None),  # over blocks that are open
            self._watching([site], keep=True) as watched,
        ):
            self.module(**self._sample, **extra)
            record = watched[site].record
            with FirstInput(self.attention_module(site)) as first:
                attempt(self.module, lambda: self.module(input_ids=ids[:1, :1], **extra))
            return dict(call_maps(record, first, watched[site]))

    def embeddings(self) -> Embeddings:
        name = type(self.module).__name__
        if getattr(self.module.config, "is_encoder_decoder", False):
            raise TapError(
                f"{name} has an encoder and a decoder; the vocabulary of decoder-only models is "
                "known here."
            )
        try:
            table, head = self.module.get_input_embeddings(), self.module.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            table = head = None
        if not all(isinstance(getattr(m, "weight", None), torch.Tensor) for m in (table, head)):
            raise TapError(
                f"{name} has no unembedding (or no token embedding), so its vocabulary is not "
                "known here."
            )
        cap = getattr(text_config(self.module), "final_logit_softcapping", None)
        held = stored(table)
        if held is not None:
            embedded = held[0]
        else:  # offloaded or packed: what it gives for each token
            tokens = torch.arange(table.weight.shape[0], device=self.device)
            with torch.no_grad():
                embedded = table(tokens)
        plain = stored(head) or linear_map(head, embedded.new_empty(0, embedded.shape[1]))
        return Embeddings(embedded, plain[0].T, plain[1], cap)

    def norms(self, ids: torch.Tensor) -> Norms:
        attentions = {s.layer: self.attention_module(s) for s in self._main_sites()}
        blocks = {layer: block for layer, block in self.blocks().items() if layer in attentions}
        return find(blocks, attentions, self.final_norm(), lambda: self.forward(input_ids=ids))

    def ordinary(self, ids: torch.Tensor) -> torch.Tensor:
        token = image_token(self.module.config)
        return ids if token is None else torch.where(ids == token, (token + 1) % 3, ids)

    def explain(self, tap: Tap, tokens: int) -> str:
        routes: dict[Site, dict[str, str]] = {site: {} for site in self.sites}

        def note(call: AttentionCall) -> None:
            route = explain_call(call, tap)
            if route:
                routes[call.site]["decode" if call.is_decode else "prefill"] = route

        inputs = {k: v for k, v in self._sample.items() if k != "attention_mask"}
        if set(inputs) == {"input_ids"}:
            row = inputs["input_ids"][:1]
            inputs["input_ids"] = row.repeat(1, -(-tokens // row.shape[1]))[:, :tokens]
        with torch.no_grad(), self._tapped(tap, note):
            cached = dict(use_cache=True) if self.has_cache else {}
            out = self.module(**inputs, **cached)
            cache = getattr(out, "past_key_values", None)
            if cache is not None and set(inputs) == {"input_ids"}:
                self.module(
                    input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True
                )
        return table(self.sites, tap.edits, routes)


def _first(output: Any) -> torch.Tensor:
    """The first tensor of what a module gives."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    return output
