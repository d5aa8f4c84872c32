"""From what a projection gives to what the attention call gets: norms of queries and keys with
their scale held, and rotation, as one matrix at a position.

The call's query is q = L·(x W_Q + b_Q) + o. Where a norm of queries follows the projection it is
read as a norm and frozen at the run's input, by head or over all heads; all that comes after it
must be linear (RoPE, factors by position), and its matrix is taken by differentiation. That L and o
give the call's own query is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from interp.errors import TapError
from interp_hooks import norms

if TYPE_CHECKING:
    from interp_hooks import HookedModel
    from interp_hooks.call import Site

#: largest difference, relative to the largest magnitude, between the call's vector and the map's
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
#: modules that are no norm whatever they are given
NO_NORM = (torch.nn.Linear, torch.nn.Identity, torch.nn.Dropout)


@dataclass(frozen=True)
class ScoreMap:
    """y = x @ matrix + offset, float64: matrix (d_head, d_head), offset (d_head,)."""

    matrix: torch.Tensor
    offset: torch.Tensor


@dataclass
class Seen:
    """One place, "q" or "k", on its way from projection to call.

    `projected`, `called` (1, tokens, heads, d_head): ends of the way, with the graph between;
    `module`, `entered`, `left`: what seems to be a norm just behind the projection, its input and
    output; `layout`: how these lie.
    """

    projected: torch.Tensor | None = None
    called: torch.Tensor | None = None
    module: torch.nn.Module | None = None
    entered: torch.Tensor | None = None
    left: torch.Tensor | None = None
    layout: str = "tokens"


@dataclass
class Way:
    """What was seen of the queries and keys of one layer in one forward."""

    layer: int
    places: dict[str, Seen] = field(default_factory=lambda: {"q": Seen(), "k": Seen()})

    def at_projection(self, place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if layer != self.layer or place not in self.places:
            return None
        torch.set_grad_enabled(True)  # until the call; the block around restores what was
        leaf = tensor.detach().clone().requires_grad_()
        self.places[place] = Seen(projected=leaf)
        return leaf

    def at_module(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        """Notes what may be a norm: it takes what a projection gave, and keeps its shape."""
        given = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if given is None or not isinstance(output, torch.Tensor) or output.shape != given.shape:
            return
        for seen in self.places.values():
            if seen.projected is None or seen.called is not None or seen.module is not None:
                continue
            layout = _layout(given.detach(), seen.projected.detach())
            if layout:
                seen.module, seen.entered, seen.left = module, given.detach(), output
                seen.layout = layout
                return

    def at_call(self, place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        """Takes the call's queries or keys; the rest of the forward goes on without gradients."""
        if layer != self.layer or place not in self.places:
            return None
        self.places[place].called = tensor
        if place == "k":  # the tap tells of queries first
            torch.set_grad_enabled(False)
        return tensor.detach()


@contextmanager
def watching(model: HookedModel, ways: Mapping[Site, Way]) -> Iterator[None]:
    """Lets ways see what leaves the projections and norms of their layers; without gradients but
    between these and the call."""
    by_layer = {site.layer: way for site, way in ways.items()}

    def project(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        way = by_layer.get(layer)
        return None if way is None else way.at_projection(place, layer, tensor)

    with torch.no_grad(), ExitStack() as stack:
        for site, way in ways.items():
            attention = model.module.get_submodule(site.path)
            for module in attention.modules():
                if module is not attention and not isinstance(module, NO_NORM):
                    stack.callback(module.register_forward_hook(way.at_module).remove)
        stack.enter_context(model.projections(project))
        yield


def _layout(given: torch.Tensor, projected: torch.Tensor) -> str:
    """How `given` holds the same numbers as `projected` (1, tokens, heads, d_head): "flat" (…,
    heads · d_head), "tokens" (…, tokens, heads, d_head), "heads" (…, heads, tokens, d_head); "" if
    it does not."""
    if given.numel() != projected.numel():
        return ""
    _, n, heads, d = projected.shape
    if given.shape[-1] == heads * d and torch.equal(given.reshape(n, -1), projected.reshape(n, -1)):
        return "flat"
    if given.shape[-1] != d:
        return ""
    if torch.equal(given.reshape(projected.shape), projected):
        return "tokens"
    turned = given.reshape(1, heads, n, d).transpose(1, 2)
    return "heads" if torch.equal(turned, projected) else ""


def score_map(
    model: HookedModel, way: Way, place: str, position: int, head: int
) -> tuple[ScoreMap, torch.Tensor]:
    """The map of one head (of the call's own count) at one position, and the call's vector
    (d_head,), float64.

    Raises `TapError` where what lies between is no norm followed by a linear map.
    """
    seen = way.places[place]
    if seen.projected is None or seen.called is None:
        raise TapError(
            f"The queries and keys of layer {way.layer} of {model.name} were not seen on their way "
            "from projection to attention, so a score can't be split."
        )
    called = seen.called[0, position, head]  # (d_head,)
    x, y = seen.projected[0, position, head].detach().double(), called.detach().double()
    most = CLOSE.get(seen.projected.dtype, 2e-2) * float(y.abs().max().clamp_min(1e-30))
    for norm in (norm_of(model, way, seen), None):
        if norm is None:
            to = ScoreMap(torch.eye(len(x)).to(x), torch.zeros_like(x))
            turn = _jacobian(called, seen.projected, "tokens", seen, position, head)
        else:
            assert seen.left is not None
            to = frozen_norm(norm, seen, position, head)
            turn = _jacobian(called, seen.left, seen.layout, seen, position, head)
        made = ScoreMap(to.matrix @ turn.T, to.offset @ turn.T)
        if float((x @ made.matrix + made.offset - y).abs().max()) <= most:
            return made, y
    what = "queries" if place == "q" else "keys"
    raise TapError(
        f"The {what} of layer {way.layer} of {model.name} are not what a norm and a linear map "
        "make of their projection, so a score can't be split into writers."
    )


def _jacobian(
    called: torch.Tensor, start: torch.Tensor, layout: str, seen: Seen, position: int, head: int
) -> torch.Tensor:
    """(d_head, d_head) float64 ∂ called / ∂ start, of one head at one position."""
    rows = []
    for i in range(len(called)):
        (slope,) = torch.autograd.grad(called[i], start, retain_graph=True, allow_unused=True)
        if slope is None:  # there is another way: the check tells
            return called.new_zeros(len(called), len(called), dtype=torch.float64)
        rows.append(vector_at(slope, layout, seen, position, head).double())
    return torch.stack(rows)


def vector_at(
    tensor: torch.Tensor, layout: str, seen: Seen, position: int, head: int
) -> torch.Tensor:
    """(d_head,) of one head at one position, in a layout."""
    assert seen.projected is not None
    _, n, heads, d = seen.projected.shape
    if layout == "heads":
        return tensor.reshape(heads, n, d)[head, position]
    return tensor.reshape(n, heads, d)[position, head]


def norm_of(model: HookedModel, way: Way, seen: Seen) -> norms.Norm | None:
    """The norm that stands just behind the projection; None where nothing does."""
    if seen.module is None:
        return None
    assert seen.projected is not None
    _, _, heads, d = seen.projected.shape
    flat = seen.layout == "flat"
    try:
        norm = norms.read(seen.module, heads * d if flat else d)
    except TapError:  # a rotation, say
        return None
    if flat and norm.centres:
        raise TapError(
            f"Layer {way.layer} of {model.name} centres queries or keys over all heads together, "
            "so one head's score can't be split."
        )
    return norm


@torch.no_grad()
def frozen_norm(norm: norms.Norm, seen: Seen, position: int, head: int) -> ScoreMap:
    """The norm at the run's input, its scale held, for one head."""
    assert seen.entered is not None and seen.projected is not None
    _, n, heads, d = seen.projected.shape
    gain, bias = norm.gain, norm.bias
    if seen.layout == "flat":
        x = seen.entered.reshape(n, heads * d)[position]
        part = slice(head * d, (head + 1) * d)
        gain, bias = gain[part], bias[part]
    else:
        x = vector_at(seen.entered, seen.layout, seen, position, head)
    scale = norm.frozen(x[None, None]).scale.reshape(())
    return ScoreMap(norm.centred(torch.eye(d).to(gain)) * gain * scale, bias)  # rows: of each e_i
