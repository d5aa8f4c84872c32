"""diffusers' models (DiT, PixArt, SD3, Flux, U-Nets) behind `HookedModel`.

They are recognised by duck type, never imported. A forward is one step of a sampling loop: tokens
are patches of a picture, none is padding, and there is no cache and no vocabulary. The module is
tapped while a block lasts, so a pipeline that calls it is observed and edited too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from interp_hooks.activations import Hook
from interp_hooks.adapter import Adapter
from interp_hooks.blocks import undisturbed
from interp_hooks.call import AttentionCall, Site
from interp_hooks.diffusion.finding import sites_of
from interp_hooks.diffusion.fused import answered
from interp_hooks.engine import Tap, attend, explain_call
from interp_hooks.errors import TapError
from interp_hooks.head_weights import HeadWeights
from interp_hooks.norms import Norms
from interp_hooks.routes import table
from interp_hooks.vocabulary import Embeddings

#: names of the matrices of an attention in diffusers
_PROJECTIONS = {"W_Q": "to_q", "W_K": "to_k", "W_V": "to_v"}


def is_diffusers(module: Any) -> bool:
    """Whether a model is one of diffusers'."""
    return any(
        kind.__name__ == "ModelMixin" and kind.__module__.startswith("diffusers.")
        for kind in type(module).__mro__
    )


class DiffusersAdapter(Adapter):
    """A diffusers model, tapped where its attention modules call torch's fused attention.

    `sample`: arguments of a forward, by which its attentions are found.
    """

    max_context = None

    def __init__(self, module: Any, sample: dict[str, Any]):
        self.module, self._sample = module, sample
        self.accepts = frozenset(inspect.signature(module.forward).parameters)
        with torch.no_grad(), undisturbed(module):
            self._modules = sites_of(module, lambda: module(**sample))
        self.sites = sorted(self._modules, key=lambda s: (s.layer, s.kind != "self"))
        # why W_O is not known at a site, after the check on load
        self._unknown: dict[Site, str] = {}

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.module(*args, **inputs)

    def generate(self, **inputs: Any) -> torch.Tensor:
        raise TapError(
            "A diffusion model draws in a sampling loop: run its pipeline in the block, or "
            "interp.diffusion.draw."
        )

    @contextmanager
    def installed(self, tap: Tap) -> Iterator[None]:
        def handler(call: AttentionCall) -> torch.Tensor:
            tap.check_thread()
            return attend(call, tap)

        with answered(self._modules, handler):
            yield

    @contextmanager
    def outputs(self) -> Iterator[dict[Site, torch.Tensor]]:
        by_site: dict[Site, torch.Tensor] = {}
        with ExitStack() as stack:
            for site, module in self._modules.items():

                def take(part: Any, args: tuple, out: Any, site: Site = site) -> None:
                    by_site[site] = out[0] if isinstance(out, tuple) else out

                stack.callback(module.register_forward_hook(take).remove)
            yield by_site

    def compare_output(self, site: Site, z: torch.Tensor, out: torch.Tensor, most: float) -> None:
        try:
            weights = self._read(site)
        except TapError as reason:
            self._unknown[site] = str(reason)
            return
        found = torch.einsum("bqhd,hdm->bqm", z.double(), weights.W_O.double())
        if weights.b_O is not None:
            found = found + weights.b_O.double()
        out = out.double()
        same = found.shape == out.shape
        if not same or float((found - out).abs().max()) > most * float(out.abs().max()):
            self._unknown[site] = (
                f"What {site.path} gives is not Σ_h z_h W_O,h + b_O, so its head weights are "
                "refused."
            )

    def residual(self, write: Hook | None, keep: bool = True) -> Any:
        raise TapError(
            "The residual stream of diffusers' models is gated by the time of the step, and is not "
            "read here."
        )

    def projections(self, hook: Hook) -> Any:
        raise TapError("Projections of diffusers' models are not read here; use model.watch.")

    def blocks(self) -> dict[int, torch.nn.Module]:
        return {
            s.layer: self.module.get_submodule(s.path.rpartition(".")[0])
            for s in self.sites
            if s.is_main
        }

    def head_weights(self, site: Site) -> HeadWeights:
        if site in self._unknown:
            raise TapError(self._unknown[site])
        return self._read(site)

    def _read(self, site: Site) -> HeadWeights:
        """The matrices of a plain attention. Raises `TapError` for joint or fused ones."""
        module = self._modules[site]
        if getattr(module, "add_k_proj", None) is not None:
            raise TapError(
                f"{site.path} attends to a picture and a text with matrices of their own, so a "
                "head has no one W_Q, W_K, W_V and W_O."
            )
        heads = {"W_Q": site.n_heads, "W_K": site.n_kv_heads, "W_V": site.n_kv_heads}
        found: dict[str, torch.Tensor | None] = {}
        for name, attribute in _PROJECTIONS.items():
            part = _linear(module, attribute, site)
            rows = part.weight.unflatten(0, (heads[name], site.d_head))  # (heads, d, d_model)
            bias = None if part.bias is None else part.bias.unflatten(0, (heads[name], -1))
            times = site.n_heads // heads[name]
            found[name] = rows.repeat_interleave(times, 0).transpose(1, 2)
            found[f"b_{name[-1]}"] = None if bias is None else bias.repeat_interleave(times, 0)
        out = _linear(module, "to_out", site)
        normed = {name for name in "qk" if getattr(module, f"norm_{name}", None) is not None}
        return HeadWeights(
            **found,  # type: ignore[arg-type]
            W_O=out.weight.T.unflatten(0, (site.n_heads, site.d_head)),
            b_O=out.bias,
            normed=frozenset(normed),
        )

    def output_projection(self, site: Site) -> torch.nn.Module:
        self.head_weights(site)
        return _linear(self._modules[site], "to_out", site)

    def embeddings(self) -> Embeddings:
        raise TapError("A diffusion model has no vocabulary.")

    def norms(self, ids: torch.Tensor) -> Norms:
        raise TapError("The norms of diffusers' models depend on the time of the step.")

    def ordinary(self, ids: torch.Tensor) -> torch.Tensor:
        return ids

    @torch.no_grad()
    def explain(self, tap: Tap, tokens: int) -> str:
        """Of the sample's size, whatever `tokens` is: a picture has as many as it has patches."""
        routes: dict[Site, dict[str, str]] = {site: {} for site in self.sites}

        def note(call: AttentionCall) -> torch.Tensor:
            if way := explain_call(call, tap):
                routes[call.site]["prefill"] = way
            return attend(call, Tap())

        with answered(self._modules, note):
            self.module(**self._sample)
        return table(self.sites, tap.edits, routes)


def _linear(module: torch.nn.Module, name: str, site: Site) -> torch.nn.Linear:
    """A projection. Raises `TapError` where it is none by that name."""
    part = getattr(module, name, None)
    if isinstance(part, torch.nn.ModuleList):
        part = part[0]
    if not isinstance(part, torch.nn.Linear):
        raise TapError(
            f"{site.path} has no plain projection {name}, so its head weights are not known."
        )
    return part
