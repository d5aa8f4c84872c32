"""VAR: visual attention redistribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.checks import count, counts, real
from interp.edits.head_edit import HeadEdit
from interp.edits.keys import (
    KeySet,
    at_hand,
    check,
    groups,
    known,
    member,
    per_sample,
    query_positions,
    slots_of,
    spans_of,
)
from interp.errors import EditError
from interp.vision.sinks import (
    SinkMemory,
    are_sinks,
    named_dims,
    published_dims,
    ratios,
    stream_width,
    tau_of,
)
from interp_hooks.edit import BoundEdit, CallEdit, Scope
from interp_hooks.heads import Head
from interp_kernels import Request, Result, Rule, Steer

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model


@dataclass(frozen=True)
class VAR(HeadEdit):
    """Visual attention redistribution (VAR): sinks give the share p to the rest of the image.

    (Kang et al., ICLR 2025, arXiv 2503.03321.) Keys are text sinks T, visual sinks V, the rest of
    the image N, and others. In heads that look at the image, for the query rows after it,

        a_k' = (1 − p) a_k on T and V
        a_j' = a_j·(1 + p (m_T + m_V) / m_N) on N
        others stay

    decided head by head and row by row: m_V + m_N ≥ image_mass and m_N ≥ ρ (m_V + m_N).

    By default the sinks are found while the model runs, layer by layer, in the residual stream that
    enters the layer: tokens with φ(x) = max_{d in dims} |x[d]| / RMS(x) ≥ τ, of the prompt and of
    what is generated. A layer without visual sinks: by "paper" its text sinks still give; by "code"
    the sample is left alone there.

    Args:
        image: the image's tokens: "image" (those of the prompt at hand), (start, stop) from each
            sample's first real token, or (batch, slots) bool.
        text_sinks, visual_sinks: the sinks instead of a search: tokens, as in `ScaleTokens`, or
            {layer: tokens} (other layers are then left alone); visual sinks are image tokens.
            `VAR.find_sinks` reads them from a stream.
        p, rho, image_mass: as above.
        tau: None for the paper's 20 (31 % of √d_model in streams below 484, where 20 is out of
            reach: `interp.vision.sinks.tau_of`).
        dims: the sink dimensions of the stream; "auto": those published for the model
            (`interp.vision.sinks`), else, in each sample and layer, where its first token's |x[d]|
            / RMS(x) ≥ τ, either without those in which the median token reaches τ (a bias of the
            stream); None: no search.
        preset: "paper", or "code", as released: p is what sinks *keep*, heads have m_V ≤ ρ (m_V +
            m_N), ρ is 0.5, a sample without visual sinks is left alone, and the last layer is
            edited too.
        last_layer: edit it or not; None as the preset says.
        heads: None for all.
        scope: "all" (rows after the image, prompt and generated), "prefill" or "decode".

    Misleads:
        It finds nothing in a model without massive activations (pocket-llava). Paper and code
        disagree on what p means. On smol-llava neither preset lowers the share of made-up objects.

    Raises:
        EditError: a number outside [0, 1], no image, neither sinks nor a search for them, or both;
            on entry, a dimension or a τ that the model can't have; in use, a prompt without image,
            or one read outside the block.

    Example:
        >>> edit = interp.edits.VAR(
        ...     (2, 8), text_sinks="initial", p=1.0, rho=0.0, image_mass=0.0, dims=None
        ... )
        >>> with model.edit(edit), model.observe("topk", topk=12, stage="after") as seen:
        ...     _ = model.logits(torch.arange(12)[None])
        >>> first = seen[2].topk_index[0, 0, 11] == 0  # the text sink, in a row after the image
        >>> float(seen[2].topk_prob[0, 0, 11][first])
        0.0
    """

    image: KeySet = "image"
    text_sinks: Any = None
    visual_sinks: Any = None
    p: float = 0.6
    tau: float | None = None
    rho: float | None = None
    image_mass: float = 0.2
    preset: str | None = "paper"
    dims: Any = "auto"
    last_layer: bool | None = None
    heads: tuple[Head, ...] | None = None
    scope: Scope = "all"

    name = "var"
    presets = {
        "paper": {"rho": 0.8, "last_layer": False},
        "code": {"rho": 0.5, "last_layer": True},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is None:
            object.__setattr__(self, "preset", "paper")
        usual = self.preset_settings(self.preset)
        if self.image is None:
            raise EditError('var needs image=: "image", (start, stop), or a (batch, slots) tensor.')
        has_sinks = self.text_sinks is not None or self.visual_sinks is not None
        if self.dims is None and not has_sinks:
            raise EditError(
                "var needs the sink tokens (text_sinks=, visual_sinks=), or dims= to search for "
                "them."
            )
        if isinstance(self.dims, str) and self.dims != "auto":
            raise EditError(
                f'dims of var are "auto", or numbers of the residual stream, not {self.dims!r}.'
            )
        if self.dims is not None and self.dims != "auto":
            if has_sinks:
                raise EditError("var takes the sink tokens, or dims to search for them, not both.")
            object.__setattr__(self, "dims", counts(self.dims, "dims of var"))
            if not self.dims or min(self.dims) < 0:
                raise EditError(
                    f"dims of var are numbers of the residual stream, from 0, not {self.dims}."
                )
        object.__setattr__(self, "tau", self._number("tau"))
        if self.tau is not None and not self.tau > 0:
            raise EditError(f"τ of var is above 0, not {self.tau}.")
        object.__setattr__(self, "image", check(self.image))
        for name in ("text_sinks", "visual_sinks"):
            object.__setattr__(self, name, _by_layer(getattr(self, name)))
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("p", "rho", "image_mass"):
            object.__setattr__(self, name, real(getattr(self, name), f"{name} of var"))
            if not 0 <= getattr(self, name) <= 1:
                raise EditError(f"{name} of var is between 0 and 1, not {getattr(self, name)}.")
        self._check_inside()

    def _check_inside(self) -> None:
        """Raise `EditError` for a visual sink that is no image token, where positions tell."""
        if not known(self.image):
            return
        inside = {k for a, b in spans_of(self.image) for k in range(a, b)}
        sinks = self.visual_sinks
        for keys in sinks.values() if isinstance(sinks, dict) else [sinks]:
            spans = spans_of(keys) if keys is not None and known(keys) else []
            outside = [k for a, b in spans for k in range(a, b) if k not in inside]
            if outside:
                raise EditError(
                    f"Token {outside[0]} is a visual sink of var, but not in the image "
                    f"{self.image}."
                )

    @property
    def moved(self) -> float:
        """The share that sinks give up."""
        return 1 - self.p if self.preset == "code" else self.p

    @property
    def searches(self) -> bool:
        """Whether sinks are found while the model runs."""
        return self.text_sinks is None and self.visual_sinks is None

    @property
    def needs_hidden(self) -> bool:
        return self.searches

    def is_identity(self) -> bool:
        return self.moved == 0 or super().is_identity()

    def bind(self, model: Model) -> CallEdit:
        self.check_model(model)
        edit = self.reading(model)
        return BoundVAR(edit, self._memory(model) if self.searches else None, model.n_layers - 1)

    def _memory(self, model: Model) -> SinkMemory:
        """Where a search notes sinks. Raises `EditError` for a dimension or a τ that the model
        can't have."""
        width = stream_width(model)
        dims = published_dims(model) if self.dims == "auto" else self.dims
        if dims and width is not None and max(dims) >= width:
            raise EditError(
                f"{model.name} has a residual stream of {width}, and dims of var name {max(dims)}."
            )
        tau = tau_of(width) if self.tau is None else self.tau
        if width is not None and tau > width**0.5:
            raise EditError(
                f"No token of {model.name} reaches τ = {tau:g}: |x| / RMS(x) is at most √{width} = "
                f"{width**0.5:.1f} in its residual stream; give var a smaller tau=."
            )
        return SinkMemory(dims, tau, named=self.dims != "auto")

    @staticmethod
    def find_sinks(hidden: torch.Tensor, dims: Sequence[int], tau: float = 20.0) -> torch.Tensor:
        """(batch, tokens) bool: φ(x) = max_{d in dims} |x[d]| / RMS(x) ≥ τ on the stream entering a
        layer, (batch, tokens, d_model), as `model.capture_resid()` gives it in resid["pre",
        layer]."""
        size = ratios(hidden)
        return are_sinks(size, named_dims(size, dims), tau)

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        sinks = self.text_sinks, self.visual_sinks
        return self.moving(
            call, *(s.get(call.site.layer) if isinstance(s, dict) else s for s in sinks)
        )

    def moving(self, call: AttentionCall, text: Any, visual: Any) -> Steer | None:
        """The steer with these text and visual sinks, token positions or (batch, slots) bool."""
        if (text is None and visual is None) or (self.preset == "code" and visual is None):
            return None
        text = [] if text is None else at_hand(call, text)
        visual = [] if visual is None else at_hand(call, visual)
        rows = self._rows(call)
        if self.preset == "code":
            if not isinstance(visual, torch.Tensor) and not visual:
                return None
            if isinstance(visual, torch.Tensor):
                rows = rows & self._inside(call, visual).any(-1, keepdim=True)
        if isinstance(visual, torch.Tensor):
            image, sinks = member(call, self.image), member(call, visual)
            labels = torch.where(image & sinks, 3, torch.where(image, 2, member(call, text).long()))
            where: dict[str, Any] = dict(labels=labels.expand(call.batch, -1)[:, None])
        else:
            where = groups(call, [text, self.image, visual])
        return Steer(rule=self._rule(call, rows), **where)

    def _rule(self, call: AttentionCall, rows: torch.Tensor) -> Rule:
        """Over others, text sinks, the rest of the image, visual sinks."""
        assert self.rho is not None
        device, left = call.value.device, 1 - self.moved
        factors = torch.where(self.chosen(call.site, device), left, 1.0)  # (heads,)
        one = torch.ones_like(factors)
        keep = torch.stack([one, factors, one, factors], -1)
        receive = torch.tensor([[0.0, 0.0, 1.0, 0.0]], device=device)
        few_sinks = [self.rho, self.rho - 1] if self.preset == "code" else [1 - self.rho, -self.rho]
        tests = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, *few_sinks]], device=device)
        bounds = torch.tensor([self.image_mass, 0.0], device=device)
        return Rule(keep, receive, tests=tests, bounds=bounds, rows=rows.expand(call.batch, -1))

    def _rows(self, call: AttentionCall) -> torch.Tensor:
        """(batch or 1, queries) bool: the rows after the image."""
        keys = at_hand(call, self.image)
        marks = slots_of(call, keys)
        if marks is None:
            return query_positions(call) >= max((b for _, b in spans_of(keys)), default=0)
        image = per_sample(call, marks)  # (batch or 1, slots)
        slots = torch.arange(1, image.shape[1] + 1, device=image.device)
        stop = torch.where(image, slots, 0).amax(-1, keepdim=True)
        return torch.arange(call.n_queries, device=image.device) + call.mask.q_start >= stop

    def _inside(self, call: AttentionCall, visual: torch.Tensor) -> torch.Tensor:
        """(batch or 1, …) bool: the visual sinks that are image tokens."""
        marks = slots_of(call, self.image)
        if marks is None:  # by position: in the columns of this call
            return member(call, self.image) & member(call, visual)
        image, sinks = per_sample(call, marks), per_sample(call, visual)
        width = min(image.shape[1], sinks.shape[1])
        return image[:, :width] & sinks[:, :width]

    def route(self, site: Site) -> str:
        return (
            f"var {self.preset} {self.moved:g} moved: a rule over four groups of keys, gated by "
            "their masses"
        )


class BoundVAR(BoundEdit[VAR]):
    """VAR in one model of which `last` is the last layer; `memory` holds the sinks that a search
    finds."""

    def __init__(self, edit: VAR, memory: SinkMemory | None, last: int):
        super().__init__(edit)
        self.memory, self.last = memory, last

    def at(self, site: Site) -> bool:
        return self.edit.at(site) and (bool(self.edit.last_layer) or site.layer != self.last)

    def touches(self, call: AttentionCall) -> bool:
        """A search reads along outside its scope too."""
        return self.at(call.site) and (self.memory is not None or self.edit.touches(call))

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer | None:
        if self.memory is None:
            return self.edit.steer(call, measure)
        sinks = self.memory.see(call)
        slots_of(call, self.edit.image)  # no image is refused, also where there is no sink
        if not self.edit.in_scope(call) or not bool(sinks.any()):
            return None
        return self.edit.moving(call, sinks, sinks)

    def route(self, site: Site) -> str:
        """With how many tokens of the prompt read last are sinks there."""
        route, count = self.edit.route(site), self.memory and self.memory.count(site.layer)
        return route if not count else f"{route}; {count[0]} of {count[1]} tokens are sinks"


def _by_layer(keys: Any) -> Any:
    """A set of keys, {layer: set}, or None, in stored form."""
    if isinstance(keys, Mapping):
        return {_layer(layer): check(one) for layer, one in keys.items()}
    return None if keys is None else check(keys)


def _layer(written: Any) -> int:
    """A layer's number; JSON has it as text. Raises `EditError`."""
    digits = isinstance(written, str) and written.isdecimal()
    return int(written) if digits else count(written, "A layer of var's sinks")
