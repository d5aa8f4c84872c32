"""TransformerLens models (`HookedTransformer`, `TransformerBridge`) behind `HookedModel`, by their
own hook points.

They are recognised by duck type, never imported. They materialise every attention pattern
themselves, so statistics are taken from it; for long contexts use the plain HuggingFace model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from interp_hooks.activations import Hook, Residual
from interp_hooks.adapter import Adapter
from interp_hooks.call import AttentionCall, Site
from interp_hooks.edit import CallEdit
from interp_hooks.engine import (
    Tap,
    attend_anew,
    check_finite,
    rewritten,
    shows_weights,
    steers_of,
)
from interp_hooks.errors import TapError
from interp_hooks.head_weights import HeadWeights
from interp_hooks.norms import Norms
from interp_hooks.patterns import answer_from_pattern, pattern_result, steered_pattern
from interp_hooks.prompt_tokens import PromptTokens
from interp_hooks.steered import Steered, gains
from interp_hooks.transformer_lens.endings import Endings
from interp_hooks.vocabulary import Embeddings
from interp_kernels import Mask

PLACES = {"pre": "hook_resid_pre", "mid": "hook_resid_mid", "post": "hook_resid_post"}


def is_transformer_lens(model: Any) -> bool:
    """HookedTransformer or TransformerBridge, by what they offer."""
    return all(
        hasattr(model, name)
        for name in ("cfg", "hook_dict", "hooks", "run_with_hooks", "run_with_cache")
    )


class TLAdapter(Adapter):
    """Hooks at hook_v, hook_pattern and hook_z of every block."""

    def __init__(self, module: Any):
        self.module = module
        cfg = module.cfg
        self.max_context = getattr(cfg, "n_ctx", None)
        kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        self.sites = [
            Site("", layer, "self", f"blocks.{layer}.attn", cfg.n_heads, kv, cfg.d_head)
            for layer in range(cfg.n_layers)
        ]
        missing = [
            site
            for site in self.sites
            for point in ("pattern", "z")
            if f"{site.path}.hook_{point}" not in module.hook_dict
        ]
        if missing:
            raise TapError(
                f"Layer {missing[0].layer} of this TransformerLens model has no pattern or z hook "
                "point."
            )
        self._mask: torch.Tensor | None = None
        self.tokens = PromptTokens()  # of the block that is open
        self._ends = Endings()
        self.accepts = frozenset()  # no caches and no position ids through this door

    def forward(self, *args: Any, **inputs: Any) -> Any:
        ids = args[0] if args else inputs.pop("input_ids")
        mask = inputs.pop("attention_mask", None)
        device = next(self.module.parameters()).device
        self._mask = None if mask is None or bool(mask.all()) else mask.to(device)
        if self._mask is not None:
            inputs["attention_mask"] = self._mask
        inputs.pop(
            "position_ids", None
        )  # TransformerLens derives positions from the attention mask
        return self.module(ids.to(device), **inputs)

    def generate(self, **inputs: Any) -> torch.Tensor:
        ids = inputs.pop("input_ids")
        mask = inputs.pop("attention_mask", None)
        if mask is not None and not bool(mask.all()):
            raise TapError(
                "Padded batches in TransformerLens' generate are not supported; generate row by "
                "row."
            )
        self._mask = None
        inputs.setdefault("verbose", False)
        if getattr(self.module, "tokenizer", None) is None and inputs.get("eos_token_id") is None:
            inputs.setdefault("stop_at_eos", False)  # TransformerLens does not know where to stop
        return self.module.generate(ids, **inputs)

    @contextmanager
    def installed(self, tap: Tap) -> Iterator[None]:
        pending: dict[int, tuple[AttentionCall, AttentionCall, list[Steered]]] = {}
        values: dict[int, torch.Tensor] = {}
        # ids that were embedded and not yet attended to: how many a cache holds is seen by then
        embedded: list[torch.Tensor] = []
        self.tokens = PromptTokens()

        def on_ids(module: Any, args: tuple) -> None:
            embedded[:] = [args[0]] if args and isinstance(args[0], torch.Tensor) else []
            if embedded:
                self._ends.read(embedded[0])

        def on_value(layer: int) -> Callable[..., None]:
            def hook(v: torch.Tensor, hook: Any) -> None:
                values[layer] = v.transpose(1, 2)  # (batch, kv_heads, new keys, d)

            return hook

        def on_pattern(site: Site) -> Callable[..., Any]:
            def hook(pattern: torch.Tensor, hook: Any) -> torch.Tensor | None:
                tap.check_thread()
                call = self._ends.call(self._call(site, pattern, values[site.layer]))
                edits = tap.edits
                if site == self.sites[0]:
                    self._read(call, embedded, edits)
                if self.tokens.prompt is not None:
                    call = replace(call, tokens=self.tokens.prompt)
                edited = rewritten(call, edits)
                steers = steers_of(
                    edited,
                    edits,
                    lambda found, request: pattern_result(steered_pattern(edited, found), request),
                )
                edited = steered_pattern(edited, steers)
                pending[site.layer] = (call, edited, steers)
                return None if edited is call else edited.pattern

            return hook

        def on_z(site: Site) -> Callable[..., torch.Tensor]:
            def hook(z: torch.Tensor, hook: Any) -> torch.Tensor:
                observers, edits = tap.observers, tap.edits
                call, edited, steers = pending.pop(site.layer)
                z = gains(z, steers)
                shown = shows_weights(call, observers)
                for edit in edits:
                    if edit.touches(call):
                        z = edit.apply(edited, attend_anew(edit, edited, z, shown))
                check_finite(call, z)
                answer_from_pattern(call, [o for o in observers if o.stage == "before"], z)
                answer_from_pattern(edited, [o for o in observers if o.stage == "after"], z)
                return z

            return hook

        hooks = []
        for site in self.sites:
            hooks += [
                (f"{site.path}.hook_v", on_value(site.layer)),
                (f"{site.path}.hook_pattern", on_pattern(site)),
                (f"{site.path}.hook_z", on_z(site)),
            ]
        with ExitStack() as stack:
            embed = getattr(self.module, "embed", None)
            if embed is not None:
                stack.callback(embed.register_forward_pre_hook(on_ids).remove)
            stack.enter_context(self.module.hooks(fwd_hooks=hooks))
            stack.enter_context(self._ends.watching(self.module))
            yield

    def _read(
        self, call: AttentionCall, embedded: list[torch.Tensor], edits: Sequence[CallEdit]
    ) -> None:
        """Note the tokens of a forward at its first attention call, where an edit asks for them."""
        ids = embedded.pop() if embedded else None
        if not any(edit.needs_tokens for edit in edits):
            self.tokens.forget()
        elif ids is None or ids.shape != (call.batch, call.n_queries):
            self.tokens.read(None, call.mask.q_start)
        else:
            self.tokens.read(ids, call.mask.q_start, call.mask.keys)

    @contextmanager
    def aside(self) -> Iterator[None]:
        tokens, ends = self.tokens.copy(), self._ends
        self._ends = Endings()
        try:
            yield
        finally:
            self.tokens, self._ends = tokens, ends

    def _call(self, site: Site, pattern: torch.Tensor, value: torch.Tensor) -> AttentionCall:
        cfg, (_, _, nq, nk) = self.module.cfg, pattern.shape
        kinds = getattr(cfg, "attn_types", None)
        local = kinds is not None and kinds[site.layer] == "local"
        causal = getattr(cfg, "attention_dir", "causal") == "causal"
        keys = self._mask
        if keys is not None:
            keys = keys.bool()
            if keys.shape[1] < nk:  # tokens added since the mask was given are real
                keys = torch.nn.functional.pad(keys, (0, nk - keys.shape[1]), value=True)
        mask = Mask(
            causal,
            getattr(cfg, "window_size", None) if local else None,
            q_start=nk - nq,
            keys=keys,
            queries=None if keys is None else keys[:, nk - nq :],
            starts=None if keys is None else keys.int().argmax(1),
        )
        return AttentionCall(site, None, None, value, mask, 1.0, pattern=pattern)

    calls_have_queries = False

    @contextmanager
    def projections(self, hook: Hook) -> Iterator[None]:
        """Queries and keys as TransformerLens projects them, before rotation; keys and values
        un-repeated."""

        see = hook

        def at(name: str, layer: int) -> Callable[..., Any]:
            return lambda tensor, hook: see(name, layer, tensor)  # TransformerLens says hook=

        points = [
            (f"{s.path}.hook_{name}", at(name, s.layer)) for s in self.sites for name in "qkv"
        ]
        missing = [point for point, _ in points if point not in self.module.hook_dict]
        if missing:
            raise TapError(
                f"This TransformerLens model has no hook point {missing[0]}, so its projections "
                "can't be seen."
            )
        with self.module.hooks(fwd_hooks=points):
            yield

    @contextmanager
    def residual(self, write: Hook | None, keep: bool = True) -> Iterator[Residual]:
        residual = Residual(keep)
        points_by_name = self.module.hook_dict
        # what a rewritten "mid" adds to the skip connection around the MLP
        skipped: dict[int, torch.Tensor] = {}

        def branch_only(layer: int) -> bool:
            """A bridge's hook_resid_mid is the input of ln2: a write there misses the skip
            connection."""
            mid = points_by_name.get(f"blocks.{layer}.hook_resid_mid")
            return mid is not None and mid is points_by_name.get(f"blocks.{layer}.ln2.hook_in")

        def at(place: str, layer: int) -> Callable[..., Any]:
            def hook(tensor: torch.Tensor, hook: Any) -> torch.Tensor | None:
                moved = place == "post" and layer in skipped
                if moved:
                    tensor = tensor + skipped.pop(layer)
                new = None if write is None else write(place, layer, tensor)
                if new is not None and place == "mid" and branch_only(layer):
                    skipped[layer] = new - tensor
                stream = tensor if new is None else new
                residual.append("final" if place == "final" else (place, layer), stream.detach())
                return stream if moved else new

            return hook

        points = [
            (f"blocks.{layer}.{point}", at(place, layer))
            for layer in range(self.module.cfg.n_layers)
            for place, point in PLACES.items()
            if f"blocks.{layer}.{point}" in points_by_name
        ]
        norm = getattr(self.module, "ln_final", None)
        # its output, gain included, as in HuggingFace models: hook_normalized sits before the gain
        last = at("final", self.module.cfg.n_layers - 1)
        with ExitStack() as stack:
            if norm is not None:
                stack.enter_context(
                    norm.register_forward_hook(lambda module, args, output: last(output, None))
                )
            stack.enter_context(self.module.hooks(fwd_hooks=points))
            yield residual

    def head_weights(self, site: Site) -> HeadWeights:
        attention = self.module.blocks[site.layer].attn
        names = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
        try:
            weights = {name: getattr(attention, name) for name in names}
        except AttributeError as error:
            raise TapError(
                f"This TransformerLens model offers no weights of layer {site.layer}: {error}."
            ) from error
        for name in ("W_K", "W_V", "b_K", "b_V"):
            tensor = weights[name]
            if tensor is not None and tensor.shape[0] != site.n_heads:
                weights[name] = tensor.repeat_interleave(site.n_heads // tensor.shape[0], 0)
        normed = bool(getattr(self.module.cfg, "use_qk_norm", False))
        return HeadWeights(**weights, normed=frozenset("qk" if normed else ""))

    def blocks(self) -> dict[int, torch.nn.Module]:
        return {s.layer: self.module.blocks[s.layer] for s in self.sites}

    def embeddings(self) -> Embeddings:
        try:
            W_E, W_U, b_U = (getattr(self.module, name) for name in ("W_E", "W_U", "b_U"))
        except AttributeError as error:
            raise TapError(
                f"This TransformerLens model offers no embedding or unembedding: {error}."
            ) from error
        cap = getattr(self.module.cfg, "output_logits_soft_cap", None)
        soft = float(cap) if cap is not None and cap > 0 else None
        return Embeddings(W_E.detach(), W_U.detach(), None if b_U is None else b_U.detach(), soft)

    def norms(self, ids: torch.Tensor) -> Norms:
        blocks = {s.layer: self.module.blocks[s.layer] for s in self.sites}
        branch = bool(getattr(self.module.cfg, "use_normalization_before_and_after", False))
        return Norms(
            {layer: getattr(block, "ln1", None) for layer, block in blocks.items()},
            {
                layer: getattr(block, "ln1_post", None) if branch else None
                for layer, block in blocks.items()
            },
            getattr(self.module, "ln_final", None),
            self.module.cfg.d_model,
        )

    def ordinary(self, ids: torch.Tensor) -> torch.Tensor:
        return ids

    def explain(self, tap: Tap, tokens: int) -> str:
        lines = [
            "TransformerLens materialises each pattern; for long contexts load the HuggingFace "
            "model."
        ]
        for site in self.sites:
            mine = [e.route(site) for e in tap.edits if e.at(site)]
            lines.append(f"layer {site.layer}: {'; '.join(mine) or 'untouched weights'}")
        return "\n".join(lines)
