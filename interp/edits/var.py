"""VAR: visual attention redistribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.base import HeadEdit
from interp.edits.keys import KeySet, check, groups, member, per_sample, query_positions, spans_of
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Rule, Steer

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class VAR(HeadEdit):
    """Visual attention redistribution (Kang et al., ICLR 2025, arXiv 2503.03321). Keys are text sinks T, visual sinks
    V, the rest of the image N, and others. In heads that look at the image, for the query rows after it,

        a_k' = (1 − p) a_k on T and V        a_j' = a_j·(1 + p (m_T + m_V) / m_N) on N        others stay

    decided head by head and row by row: m_V + m_N ≥ image_mass and m_N ≥ ρ (m_V + m_N).

    Args:
        image: the image's tokens, (start, stop) from each sample's first real token, or (batch, slots) bool.
        text_sinks, visual_sinks: tokens, as in `ScaleTokens`, or {layer: tokens} (other layers are then left alone);
            visual sinks are image tokens. `VAR.find_sinks` says which tokens of a residual stream are sinks.
        p, rho, image_mass: as above; tau, dims: φ ≥ τ marks a sink.
        preset: "paper", or "code", as released: p is what sinks *keep*, heads have m_V ≤ ρ (m_V + m_N), ρ is 0.5, a
            sample without visual sinks is left alone, and the last layer is edited too.
        last_layer: edit it or not; None as the preset says.
        heads: None for all. scope: "all" (rows after the image, prompt and generated), "prefill" or "decode".

    Raises:
        EditError: a number outside [0, 1], no image, no sinks; in use, `dims`: sinks are not searched for on the way.
    """

    image: KeySet = None
    text_sinks: Any = None
    visual_sinks: Any = None
    p: float = 0.6
    tau: float = 20.0
    rho: float | None = None
    image_mass: float = 0.2
    preset: str = "paper"
    dims: Sequence[int] | None = None
    last_layer: bool | None = None
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"

    name = "var"

    def __post_init__(self) -> None:
        self.settle()
        if self.preset not in ("paper", "code"):
            raise EditError(f"The presets of var are paper and code, not {self.preset!r}.")
        if self.image is None:
            raise EditError("var needs image=, the tokens of the image: (start, stop), or a (batch, slots) tensor.")
        if self.dims is None and self.text_sinks is None and self.visual_sinks is None:
            raise EditError("var needs the sink tokens: text_sinks=, visual_sinks=, or both.")
        object.__setattr__(self, "image", check(self.image))
        for name in ("text_sinks", "visual_sinks"):
            object.__setattr__(self, name, _by_layer(getattr(self, name)))
        code = self.preset == "code"
        if self.rho is None:
            object.__setattr__(self, "rho", 0.5 if code else 0.8)
        if self.last_layer is None:
            object.__setattr__(self, "last_layer", code)
        for name in ("p", "rho", "image_mass"):
            if not 0 <= getattr(self, name) <= 1:
                raise EditError(f"{name} of var is between 0 and 1, not {getattr(self, name)}.")
        if not isinstance(self.image, torch.Tensor):
            inside = {k for a, b in spans_of(self.image) for k in range(a, b)}
            for keys in self.visual_sinks.values() if isinstance(self.visual_sinks, dict) else [self.visual_sinks]:
                known = [] if keys is None or isinstance(keys, torch.Tensor) else spans_of(keys)
                outside = [k for a, b in known for k in range(a, b) if k not in inside]
                if outside:
                    raise EditError(f"Token {outside[0]} is a visual sink of var, but not in the image {self.image}.")

    @property
    def moved(self) -> float:
        """The share that sinks give up."""
        return 1 - self.p if self.preset == "code" else self.p

    def is_identity(self) -> bool:
        return self.moved == 0 or super().is_identity()

    def bind(self, model: HookedModel) -> None:
        super().bind(model)
        if self.dims is not None:
            raise EditError("var does not search the residual stream for sinks while the model runs; find them with "
                            "VAR.find_sinks, and give them as text_sinks= and visual_sinks=.")  # fmt: skip
        object.__setattr__(self, "_last", model.n_layers - 1)

    def at(self, site: Site) -> bool:
        last = getattr(self, "_last", None)  # known once bound
        return super().at(site) and (bool(self.last_layer) or site.layer != last)

    @staticmethod
    def find_sinks(hidden: torch.Tensor, dims: Sequence[int], tau: float = 20.0) -> torch.Tensor:
        """(batch, tokens) bool: φ(x) = max_{d in dims} |x[d]| / RMS(x) ≥ τ on the stream entering a layer, (batch,
        tokens, d_model), as `model.capture_resid()` gives it in resid["pre", layer]."""
        x = hidden.float()
        rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (x[..., list(dims)] / rms).abs().amax(-1) >= tau

    def steer(self, call: AttentionCall, look: Callable[[Request], Result]) -> Steer | None:
        layer, given = call.site.layer, (self.text_sinks, self.visual_sinks)
        text, visual = (sinks.get(layer) if isinstance(sinks, dict) else sinks for sinks in given)
        if (text is None and visual is None) or (self.preset == "code" and visual is None):
            return None
        text, visual = [] if text is None else text, [] if visual is None else visual
        rows = self._rows(call)
        if self.preset == "code":
            if not isinstance(visual, torch.Tensor) and not visual:
                return None
            if isinstance(visual, torch.Tensor):
                rows = rows & per_sample(call, visual).any(-1, keepdim=True)
        if isinstance(visual, torch.Tensor):
            image, seen = member(call, self.image), member(call, visual)
            labels = torch.where(image & seen, 3, torch.where(image, 2, member(call, text).long()))
            where: dict[str, Any] = dict(labels=labels.expand(call.batch, -1)[:, None])
        else:
            where = groups(call, [text, self.image, visual])
        return Steer(rule=self._rule(call, rows), **where)

    def _rule(self, call: AttentionCall, rows: torch.Tensor) -> Rule:
        """Over others, text sinks, the rest of the image, visual sinks."""
        assert self.rho is not None
        device, left = call.value.device, 1 - self.moved
        kept = torch.where(self.chosen(call.site, device), left, 1.0)  # (heads,)
        one = torch.ones_like(kept)
        keep = torch.stack([one, kept, one, kept], -1)
        receive = torch.tensor([[0.0, 0.0, 1.0, 0.0]], device=device)
        few_sinks = [self.rho, self.rho - 1] if self.preset == "code" else [1 - self.rho, -self.rho]
        tests = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, *few_sinks]], device=device)
        bounds = torch.tensor([self.image_mass, 0.0], device=device)
        return Rule(keep, receive, tests=tests, bounds=bounds, rows=rows.expand(call.batch, -1))

    def _rows(self, call: AttentionCall) -> torch.Tensor:
        """(batch or 1, queries) bool: the rows after the image."""
        if not isinstance(self.image, torch.Tensor):
            return query_positions(call) >= max((b for _, b in spans_of(self.image)), default=0)
        image = per_sample(call, self.image)  # (batch or 1, slots)
        slots = torch.arange(1, image.shape[1] + 1, device=image.device)
        stop = torch.where(image, slots, 0).amax(-1, keepdim=True)
        return torch.arange(call.n_queries, device=image.device) + call.mask.q_start >= stop

    def route(self, site: Site) -> str:
        return f"var {self.preset} {self.moved:g} moved: a rule over four groups of keys, gated by their masses"


def _by_layer(keys: Any) -> Any:
    """A set of keys, {layer: set}, or None, in stored form."""
    if isinstance(keys, Mapping):
        return {int(layer): check(one) for layer, one in keys.items()}
    return None if keys is None else check(keys)
