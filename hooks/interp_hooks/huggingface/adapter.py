"""HuggingFace models behind `HookedModel`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from interp_hooks.activations import Rewrite
from interp_hooks.adapter import Adapter
from interp_hooks.call import AttentionCall, Site
from interp_hooks.edit import Edit
from interp_hooks.engine import attend, explain_call
from interp_hooks.errors import TapError
from interp_hooks.huggingface.images import ImageWatch, image_token
from interp_hooks.huggingface.projections import projecting
from interp_hooks.huggingface.residual import Residual, StreamWatch, Write, capture
from interp_hooks.huggingface.tap import installed, sites, text_config
from interp_hooks.norms import Norms, find
from interp_hooks.vocabulary import Embeddings
from interp_hooks.weights import HeadWeights, head_weights

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm", "layernorm")


class HFAdapter(Adapter):
    """A `transformers` model, tapped through `AttentionInterface`."""

    def __init__(self, module: Any, sample: dict[str, torch.Tensor]):
        self.module, self._sample = module, sample
        self.images = ImageWatch(module.config)
        self.accepts = frozenset(inspect.signature(module.forward).parameters)
        extra = dict(use_cache=False) if "use_cache" in self.accepts else {}
        with torch.no_grad():
            found = sites(module, lambda: module(**sample, **extra))
        self.sites = [site for site, _ in found]
        self._modules = {(s.tower, s.kind, s.layer): m for s, m in found}
        self.unsure_output: dict[Site, str] = {}  # filled by the load-time check of W_O
        limit = getattr(text_config(module), "max_position_embeddings", None)
        self.max_context = int(limit) if limit else None

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
    def installed(self, model: HookedModel) -> Iterator[None]:
        def handle(call: AttentionCall) -> torch.Tensor:
            observers, edits = model.observers_and_edits()
            return attend(call, observers, edits, model.backend)

        with self._tapped(handle, lambda: model.observers_and_edits()[1]):
            yield

    @contextmanager
    def _tapped(
        self, handle: Callable[[AttentionCall], torch.Tensor], edits: Callable[[], Sequence[Edit]]
    ) -> Iterator[None]:
        """Every attention call goes to `handle`; in the text tower it knows which tokens are an
        image's, and, where one of `edits()` needs it, the stream that entered its layer."""
        streams = StreamWatch(lambda: any(edit.needs_hidden for edit in edits()))
        blocks = {
            s.path: self.module.get_submodule(path)
            for s in self._main_sites()
            if (path := _block_path(s))
        }

        def told(call: AttentionCall) -> torch.Tensor:
            if call.site.tower == "text":
                call = replace(call, images=self.images.mask)
            hidden = streams.take(blocks.get(call.site.path))
            return handle(call if hidden is None else replace(call, hidden=hidden))

        live = {id(m): (s, told) for s, m in zip(self.sites, self._modules.values(), strict=True)}
        with ExitStack() as stack:
            for watched, watch in (
                (self.module, self.images),
                *((block, streams) for block in set(blocks.values())),
            ):
                stack.callback(watched.register_forward_pre_hook(watch, with_kwargs=True).remove)
            stack.enter_context(installed(self.module, live))
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        seen = self.images.mask
        try:
            yield
        finally:
            self.images.mask = seen

    @contextmanager
    def residual(self, write: Write | None, keep: bool = True) -> Iterator[Residual]:
        with capture(self.blocks(), self.final_norm(), write, keep) as residual:
            yield residual

    @contextmanager
    def projections(self, see: Rewrite) -> Iterator[None]:
        with projecting([(s, self.attention_module(s)) for s in self._main_sites()], see):
            yield

    def blocks(self) -> dict[int, torch.nn.Module]:
        """The transformer block of each layer of the main tower."""
        return {s.layer: self.module.get_submodule(_block_path(s)) for s in self._main_sites()}

    def final_norm(self) -> torch.nn.Module | None:
        """The norm before the unembedding, if there is one."""
        trunk = self.module.get_submodule(
            ".".join(_block_path(self._main_sites()[0]).split(".")[:-2])
        )
        for name in NORMS:
            if isinstance(found := getattr(trunk, name, None), torch.nn.Module):
                return found
        return None

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
        return head_weights(self.attention_module(site), site)

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

    def explain(self, model: HookedModel, edits: Sequence[Edit], tokens: int) -> str:
        found: dict[Site, dict[str, str]] = {site: {} for site in self.sites}

        def handle(call: AttentionCall) -> torch.Tensor:
            route = explain_call(call, edits, model.backend)
            if route:
                found[call.site]["decode" if call.is_decode else "prefill"] = route
            return attend(call, [], edits, model.backend)

        inputs = {k: v for k, v in self._sample.items() if k != "attention_mask"}
        if set(inputs) == {"input_ids"}:
            row = inputs["input_ids"][:1]
            inputs["input_ids"] = row.repeat(1, -(-tokens // row.shape[1]))[:, :tokens]
        with torch.no_grad(), self._tapped(handle, lambda: edits):
            cached = dict(use_cache=True) if model.has_cache else {}
            out = self.module(**inputs, **cached)
            cache = getattr(out, "past_key_values", None)
            if cache is not None and set(inputs) == {"input_ids"}:
                self.module(
                    input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True
                )
        lines = []
        for site in self.sites:
            mine = [e.route(site) for e in edits if getattr(e, "at", lambda s: True)(site)]
            ways = [f"{step} by {route}" for step, route in found[site].items()]
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
