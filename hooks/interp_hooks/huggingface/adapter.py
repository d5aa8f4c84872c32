"""HuggingFace models behind `HookedModel`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from interp_hooks.activations import Hook, Residual
from interp_hooks.adapter import Adapter
from interp_hooks.blocks import undisturbed
from interp_hooks.call import AttentionCall, Site
from interp_hooks.engine import Tap, attend, begin, explain_call
from interp_hooks.errors import TapError
from interp_hooks.head_weights import HeadWeights
from interp_hooks.huggingface.forwards import Forwards
from interp_hooks.huggingface.images import ImageWatch, image_token
from interp_hooks.huggingface.layout import (
    DEFAULT,
    Layout,
    check_names,
    position_table,
    text_config,
)
from interp_hooks.huggingface.output_gate import Between
from interp_hooks.huggingface.projections import projecting
from interp_hooks.huggingface.recompute import Recomputed, recomputed_elsewhere
from interp_hooks.huggingface.residual import capture
from interp_hooks.huggingface.tap import check_attentions, installed, sites
from interp_hooks.huggingface.weights import head_output, head_weights
from interp_hooks.norms import Norms, find
from interp_hooks.prompt_tokens import PromptTokens
from interp_hooks.vocabulary import Embeddings


class HFAdapter(Adapter):
    """A `transformers` model, tapped through `AttentionInterface`."""

    def __init__(self, module: Any, sample: dict[str, torch.Tensor], layout: Layout = DEFAULT):
        self.module, self._sample, self._layout = module, sample, layout
        self.images = ImageWatch(module.config)
        self._forwards: Forwards | None = None  # of the blocks that are open
        self.accepts = frozenset(inspect.signature(module.forward).parameters)
        extra = dict(use_cache=False) if "use_cache" in self.accepts else {}
        with torch.no_grad(), undisturbed(module):
            found = sites(module, lambda: module(**sample, **extra), layout)
        self.sites = [site for site, _, _ in found]
        self._modules = {(s.tower, s.kind, s.layer): m for s, m, _ in found}
        # where something stands between softmax·v and W_O, z is what W_O reads
        self._between: dict[Site, Between] = {s: b for s, _, b in found if b is not None}
        self.unsure_output: dict[Site, str] = {}  # filled by the load-time check of W_O
        check_names(module, layout)
        limit = getattr(text_config(module), "max_position_embeddings", None)
        self.max_context = int(limit) if limit else None

    def anchors(self) -> Sequence[tuple[torch.nn.Module, Hashable]]:
        return [(module, name) for name, module in self._modules.items()]

    def forward(self, *args: Any, **inputs: Any) -> Any:
        if args:
            inputs["input_ids"] = args[0]
        inputs = {
            k: v.to(self.module.device) if isinstance(v, torch.Tensor) else v
            for k, v in inputs.items()
        }
        mask = inputs.get("attention_mask")
        if mask is None:
            inputs.pop("attention_mask", None)
        return self.module(**inputs)

    def generate(self, **inputs: Any) -> torch.Tensor:
        inputs = {
            k: v.to(self.module.device) if isinstance(v, torch.Tensor) else v
            for k, v in inputs.items()
        }
        return self.module.generate(**inputs)

    @contextmanager
    def installed(self, tap: Tap) -> Iterator[None]:
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
            if (path := _block_path(s))
        }
        forwards = Forwards(self.module, tap, self.images, tokens, blocks, self._between)

        def told(call: AttentionCall) -> torch.Tensor:
            call = forwards.described(call)
            if again is not None and again.weights and call.weights is None:
                call = replace(call, weights=lambda weights: None)
            if again is None and recomputed_elsewhere(call, tap):
                return attend(call, Tap())
            if note is not None:
                note(call)
            does = tap if note is None else Tap()
            if call.site in self._between:
                return forwards.late.keep(begin(call, does, late=True))
            return attend(call, does)

        live = {id(m): (s, told) for s, m in zip(self.sites, self._modules.values(), strict=True)}
        over = note is not None or again is not None
        outer, self._forwards = self._forwards, forwards
        with ExitStack() as stack:
            stack.callback(setattr, self, "_forwards", outer)
            if again is None:
                stack.enter_context(forwards.watching(self._recomputing))
            else:
                stack.enter_context(forwards.again(again))
            answered = self.module.register_forward_hook(check_attentions, with_kwargs=True)
            stack.callback(answered.remove)
            stack.enter_context(installed(self.module, live, over))
            yield

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
        with capture(self.blocks(), self.final_norm(), write, keep, self._layout) as residual:
            yield residual

    @contextmanager
    def projections(self, hook: Hook) -> Iterator[None]:
        attentions = [(s, self.attention_module(s)) for s in self._main_sites()]
        with projecting(attentions, hook, self._layout):
            yield

    @property
    def position_table(self) -> str | None:
        return position_table(self.module, self._layout)

    @contextmanager
    def outputs(self) -> Iterator[dict[Site, torch.Tensor]]:
        by_site: dict[Site, torch.Tensor] = {}

        def note(site: Site) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                by_site[site] = output[0] if isinstance(output, tuple) else output

            return hook

        with ExitStack() as stack:
            for site in self.sites:
                hooked = self.attention_module(site).register_forward_hook(note(site))
                stack.callback(hooked.remove)
            yield by_site

    def compare_output(self, site: Site, z: torch.Tensor, out: torch.Tensor, most: float) -> None:
        try:
            weight, bias = head_output(self.attention_module(site), site, self._layout)
        except TapError as reason:
            self.unsure_output[site] = str(reason)
            return
        if z.shape[-1] != weight.shape[1]:
            self.unsure_output[site] = (
                f"W_O takes {weight.shape[1]} numbers a head, z has {z.shape[-1]}."
            )
            return
        expected = torch.einsum("bqhd,hdm->bqm", z.double(), weight.double())
        if out.numel() != expected.numel():
            self.unsure_output[site] = (
                f"its output projection gives {expected.shape[-1]} numbers a token, the layer "
                f"{out.shape[-1]}."
            )
            return
        expected = expected + bias.double() if bias is not None else expected
        actual = out.double().reshape(expected.shape)
        error = float((expected - actual).abs().max() / actual.abs().max().clamp_min(1e-6))
        if error > most:
            self.unsure_output[site] = (
                f"Σ_h z_h W_O,h differs from the layer's output by {error:.1e} of its size."
            )

    def blocks(self) -> dict[int, torch.nn.Module]:
        """The transformer block of each layer of the main tower."""
        return {s.layer: self.module.get_submodule(_block_path(s)) for s in self._main_sites()}

    def final_norm(self) -> torch.nn.Module | None:
        """The norm before the unembedding, if there is one."""
        trunk = self.module.get_submodule(
            ".".join(_block_path(self._main_sites()[0]).split(".")[:-2])
        )
        return self._layout.find(trunk, "final_norm")

    def _main_sites(self) -> list[Site]:
        return [s for s in self.sites if s.kind == "self" and s.tower in ("", "text")]

    def attention_module(self, site: Site) -> torch.nn.Module:
        """The attention module at a site."""
        return self._modules[(site.tower, site.kind, site.layer)]

    def head_weights(self, site: Site) -> HeadWeights:
        if site in self.unsure_output:
            raise TapError(
                f"Head weights of layer {site.layer} are refused: {self.unsure_output[site]}"
            )
        return head_weights(self.attention_module(site), site, self._layout)

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
        bias = getattr(head, "bias", None)
        cap = getattr(text_config(self.module), "final_logit_softcapping", None)
        return Embeddings(
            table.weight.detach(),
            head.weight.detach().T,
            None if bias is None else bias.detach(),
            cap,
        )

    def norms(self, ids: torch.Tensor) -> Norms:
        attentions = {s.layer: self.attention_module(s) for s in self._main_sites()}
        return find(
            self.blocks(), attentions, self.final_norm(), lambda: self.forward(input_ids=ids)
        )

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
        lines = []
        for site in self.sites:
            mine = [e.route(site) for e in tap.edits if e.at(site)]
            ways = [f"{step} by {route}" for step, route in routes[site].items()]
            what = "; ".join(mine + ways) if mine else "untouched weights"
            lines.append((f"{site.tower or site.kind} layer", site.layer, what))
        return "\n".join(_grouped(lines))


def _block_path(site: Site) -> str:
    """The path up to its first number, which counts the blocks: "model.layers.3" of
    "model.layers.3.self_attn", "decoder.block.0" of "decoder.block.0.layer.0.SelfAttention"; ""
    without a number."""
    parts = site.path.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: numbered + 1])


def _grouped(lines: Sequence[tuple[str, int, str]]) -> Iterator[str]:
    """One line for neighbouring layers that go the same way."""
    for (kind, what), group in itertools.groupby(lines, key=lambda line: (line[0], line[2])):
        layers = [layer for _, layer, _ in group]
        yield (
            f"{kind} {layers[0]}: {what}"
            if len(layers) == 1
            else f"{kind}s {layers[0]}–{layers[-1]}: {what}"
        )
