"""Other backward passes through the same forward: norms with their scales held, activations as
factors, products shared out, attention with another derivative.

Each rule leaves every number of the forward as it is, bit by bit, and gives it another derivative:
what an operation gave is replaced by itself plus (s − s), s a stand-in with the rule's gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import rms_norm
from torch.overrides import TorchFunctionMode

from interp.errors import TapError
from interp_hooks.activations import Hook
from interp_hooks.call import AttentionCall
from interp_hooks.edit import LiveEdit
from interp_kernels.reference import weights

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

#: largest part of the relevance that may be lost for the rules to count as applied: more than what
#: rounding loses in float32, in which norms compute, and less than what one missed part does
CLOSE, HALF = 1e-3, 5e-3
_ROOTS = {"sqrt", "rsqrt", "sqrt_", "rsqrt_"}
POWERS = {"pow", "__pow__", "float_power"}
PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
NORMS = {"layer_norm", "rms_norm"}
#: functions f with f(0) = 0, which f(x)/x makes a factor of
_ACTIVATIONS = {"relu", "gelu", "silu", "mish", "tanh", "leaky_relu", "elu", "selu", "celu"} | {
    "relu6",
    "hardswish",
}
#: attributes that hold an activation as a plain function
_HELD = {"act", "act_fn", "activation", "activation_fn", "activation_function", "hidden_act_fn"}


class Derivative(Protocol):
    """Another derivative of what a forward calls. Each method gives what stands in for a value and
    has that derivative; None leaves the value as it is."""

    def activated(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        """Of an activation out = f(x), entry by entry."""

    def called(
        self, name: str, args: tuple, kwargs: dict[str, Any], out: torch.Tensor
    ) -> torch.Tensor | None:
        """Of any other function of torch's, outside attention."""

    def patterned(self, pattern: torch.Tensor) -> torch.Tensor | None:
        """Of attention's weights (batch, heads, queries, keys), where a library shows them."""

    def attended(self, call: AttentionCall) -> torch.Tensor | None:
        """Of z (batch, queries, heads, d_head), where a library shows q, k and v."""

    def shared(self, value: torch.Tensor) -> torch.Tensor | None:
        """Of the values that attention reads."""


@dataclass(frozen=True)
class Rules:
    """What the backward pass does otherwise.

    norms: scales 1/σ are constants. activations: act(x) is x times the constant act(x)/x. products:
    of two activations, each gets half its gradient. logits, values: factors on the gradient through
    attention's logits (so to queries and keys), taken at `temperature`, and to the values; None for
    attention's own derivative.
    """

    norms: bool = True
    activations: bool = False
    products: bool = False
    logits: float | None = None
    values: float = 1.0
    temperature: float = 1.0

    def activated(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        if not self.activations:
            return None
        with torch.no_grad():
            factor = torch.where(x == 0, torch.zeros_like(x), out / x)
        return x * factor

    def called(
        self, name: str, args: tuple, kwargs: dict[str, Any], out: torch.Tensor
    ) -> torch.Tensor | None:
        if self.norms:
            if is_root(name, args):
                return out.detach()
            if name in NORMS:
                return _held_norm(name, *args, **kwargs)
        if self.products and name in PRODUCTS and both(args):
            a, b = args
            return (a * b.detach() + a.detach() * b) / 2
        return None

    def patterned(self, pattern: torch.Tensor) -> torch.Tensor | None:
        if self.logits is None:
            return None
        if not self.logits:
            return pattern.detach()
        return self.logits * softened(pattern, self.temperature)

    def attended(self, call: AttentionCall) -> torch.Tensor | None:
        return None if self.logits is None else attended(call, self)

    def shared(self, value: torch.Tensor) -> torch.Tensor | None:
        return None if self.values == 1 else self.values * value


#: layer-wise relevance propagation: with patterns held, x · ∂m/∂x adds up to m but for biases
RELEVANCE = Rules(activations=True, products=True, logits=0.0)


def same(value: torch.Tensor, stand_in: torch.Tensor) -> torch.Tensor:
    """`value`, bit by bit, with the gradient of `stand_in`."""
    return value.detach() + (stand_in - stand_in.detach())


def is_root(name: str, args: tuple) -> bool:
    """Whether a function takes a square root, or one over it."""
    return name in _ROOTS or (name in POWERS and len(args) > 1 and args[1] in (0.5, -0.5))


def both(args: tuple) -> bool:
    """Whether a function's arguments are two activations."""
    return len(args) == 2 and all(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


@contextmanager
def ruled(model: HookedModel, rules: Derivative) -> Iterator[None]:
    """Forwards of the block, on this thread, have these rules in their graph. Parameters take no
    gradient meanwhile."""
    with ExitStack() as stack:
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
        stack.enter_context(installed(model, rules))
        yield


@contextmanager
def installed(model: HookedModel, rules: Derivative) -> Iterator[None]:
    """The same, with parameters as they are."""
    mode = _Mode(rules)
    with ExitStack() as stack:
        for module in model.module.modules():
            _wrap_activations(module, mode, stack)
        stack.enter_context(model.edit(_Attention(mode)))
        stack.enter_context(model.activations(write=_shared(rules)))
        stack.enter_context(mode)
        yield


class _Mode(TorchFunctionMode):
    """Gives the functions that a forward calls their rules, outside attention."""

    def __init__(self, rules: Derivative):
        super().__init__()
        self.rules, self.off = rules, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        live = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args[:2])
        if self.off or not live:
            return func(*args, **kwargs)
        if name in _ACTIVATIONS:
            kwargs.pop("inplace", None)
            return self.activation(args[0], func(*args, **kwargs))
        out = func(*args, **kwargs)
        if not isinstance(out, torch.Tensor):
            return out
        stand_in = self.rules.called(name, args, kwargs, out)
        return out if stand_in is None else same(out, stand_in)

    def activation(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` = act(x), with the rules' derivative."""
        stand_in = self.rules.activated(x, out) if x.requires_grad else None
        return out if stand_in is None else same(out, stand_in)


def _held_norm(
    name: str,
    x: torch.Tensor,
    shape: Any,
    weight: torch.Tensor | None = None,
    bias: Any = None,
    eps: float | None = None,
) -> torch.Tensor:
    """`layer_norm` or `rms_norm` of x, its scale a constant."""
    dims = tuple(range(-len(shape), 0))
    if name == "rms_norm":
        with torch.no_grad():  # the scale, with the eps that the function itself takes by default
            ones = rms_norm(x, shape, None, eps)
            scale = torch.where(x == 0, torch.zeros_like(x), ones / x).abs().amax(dims, True)
        out = x * scale
        return out if weight is None else out * weight
    centred = x - x.mean(dims, keepdim=True)
    with torch.no_grad():
        eps = 1e-5 if eps is None else eps
        scale = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    out = centred * scale
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _wrap_activations(module: Any, mode: _Mode, stack: ExitStack) -> None:
    """A module that is an activation, or holds one as a function, gives it as one piece."""
    kind = type(module)
    if kind.__module__ in ("transformers.activations", "torch.nn.modules.activation") or (
        re.search("gelu|silu|relu|swish", kind.__name__.lower())
        and next(module.parameters(), None) is None
    ):
        own = vars(module).get("forward")
        module.forward = _whole(module.forward, mode)
        stack.callback(vars(module).__setitem__, "forward", own) if own else stack.callback(
            vars(module).pop, "forward", None
        )
    for name in _HELD & vars(module).keys():
        function = vars(module)[name]
        if callable(function):
            setattr(module, name, _whole(function, mode))
            stack.callback(setattr, module, name, function)


def _whole(function: Callable[..., Any], mode: _Mode) -> Callable[..., Any]:
    """`function` of one tensor with the rule for activations; inside it no other applies."""

    def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if mode.off:
            return function(x, *args, **kwargs)
        mode.off += 1
        try:
            out = function(x, *args, **kwargs)
            alike = isinstance(out, torch.Tensor) and out.shape == x.shape
            return mode.activation(x, out) if alike else out
        finally:
            mode.off -= 1

    return call


class _Attention(LiveEdit):
    """Attention is one piece: no rule for functions acts inside, and z has the rules' gradient."""

    def __init__(self, mode: _Mode):
        self.mode = mode

    def before(self, call: AttentionCall) -> AttentionCall:
        self.mode.off += 1
        if call.pattern is None:
            return call
        stand_in = self.mode.rules.patterned(call.pattern)
        return call if stand_in is None else replace(call, pattern=same(call.pattern, stand_in))

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        try:
            if call.query is None:
                return z  # z was computed from the pattern of `before`
            stand_in = self.mode.rules.attended(call)
            return z if stand_in is None else same(z, stand_in.to(z))
        finally:
            self.mode.off -= 1


def _shared(rules: Derivative) -> Hook:
    """Values that take their share of the gradient."""

    def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if place != "v" or not tensor.requires_grad:
            return None
        stand_in = rules.shared(tensor)
        return None if stand_in is None else same(tensor, stand_in)

    return write


def attended(call: AttentionCall, rules: Rules) -> torch.Tensor:
    """(batch, queries, heads, d_head): z from the call's queries, keys and values, with the rules'
    derivative; its value is z up to rounding."""
    q, k = call.query, call.key
    assert q is not None and k is not None
    if rules.logits:
        pattern = weights(q, k, **call.settings)
        pattern = same(pattern, rules.logits * _softened(call, rules.temperature))
    else:
        with torch.no_grad():
            pattern = weights(q, k, **call.settings)
    value = call.value.repeat_interleave(pattern.shape[1] // call.value.shape[1], 1)
    return (pattern @ value.to(pattern)).transpose(1, 2)


def _softened(call: AttentionCall, temperature: float) -> torch.Tensor:
    """(batch, heads, queries, keys): T · softmax(logits / T), learned sinks among them, whose
    gradient with respect to the logits is the softmax's at temperature T without the factor 1/T."""
    assert call.query is not None and call.key is not None
    settings = call.settings
    for name in ("scale", "softcap", "sinks"):
        if settings[name] is not None:
            settings[name] = settings[name] / temperature
    return temperature * weights(call.query, call.key, **settings)


def softened(pattern: torch.Tensor, temperature: float) -> torch.Tensor:
    """(…, keys): the same from softmax(logits) = `pattern` alone, where rows sum to 1."""
    seen = pattern > 0
    logs = torch.where(seen, pattern, torch.ones_like(pattern)).log() / temperature
    logs = logs.masked_fill(~seen, -torch.inf)
    # rows that see nothing
    logs = torch.where(seen.any(-1, keepdim=True), logs, torch.zeros_like(logs))
    return temperature * logs.softmax(-1)


def check_relevance(
    model: HookedModel, run: Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]
) -> None:
    """Raise `TapError` where it can't be known that every norm, activation and product of the model
    was found.

    With patterns held the model is linear along its own activations: a sum of logits is Σ x · ∂/∂x
    over all that enters it, embeddings among them, and over the biases. Whatever is missed breaks
    that sum. `run` makes a forward with its graph: sums of logits (any shape), and what was made to
    enter in place of what did.
    """
    embedded: list[torch.Tensor] = []
    with ExitStack() as stack:
        named = list(model.module.named_parameters())
        biases = [p for name, p in named if _is_bias(name.rsplit(".", 1)[-1])]
        biases += _embeddings(model, embedded, stack)
        asked = {id(p) for p in biases}
        for _, parameter in named:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(id(parameter) in asked)
        stack.enter_context(installed(model, RELEVANCE))
        stack.enter_context(torch.enable_grad())
        logits, entering = run()
        draw = torch.Generator().manual_seed(0)
        total = (logits * torch.randn(logits.shape, generator=draw).to(logits)).sum()
        leaves = [*entering, *embedded, *biases]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    parts = [
        float((leaf.detach().double() * g.double()).sum())
        for leaf, g in zip(leaves, grads, strict=True)
        if g is not None
    ]
    found = float(total.detach())
    lost, size = abs(found - sum(parts)), max(abs(found), *map(abs, parts))
    precise = logits.dtype in (torch.float32, torch.float64)
    if not lost <= (CLOSE if precise else HALF) * size:
        why = (
            "so some norm, activation or gate in it is of a kind that is not known here; use "
            "plain gradients (of circuits: attribution, eap, eap_ig)"
            if precise
            else "be it by rounding, or by a part of a kind that is not known here; load the model "
            "in a wider dtype (dtype='float32'), or use plain gradients (of circuits: attribution, "
            "eap, eap_ig)"
        )
        raise TapError(
            f"The backward rules don't reach all of {model.name}: {lost / size:.2g} of the "
            f"relevance is lost between its logits and its first layer, {why}."
        )


def _embeddings(
    model: HookedModel, embedded: list[torch.Tensor], stack: ExitStack
) -> list[torch.Tensor]:
    """Tables of embeddings and positions that a model may read without calling their modules; what
    a called one gives is put in `embedded` while the stack is open. A table that is the unembedding
    too is not among the first."""
    last = getattr(model.module, "get_output_embeddings", lambda: None)()
    tied = None if last is None else getattr(last, "weight", None)

    def take(module: Any, args: tuple, out: Any) -> Any:
        if not (isinstance(out, torch.Tensor) and out.is_floating_point()):
            return None
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    tables = {}
    for module in model.module.modules():
        table = isinstance(module, torch.nn.Embedding)
        if table or re.search("Position.*Embedding", type(module).__name__):
            stack.callback(module.register_forward_hook(take).remove)
        if table and module.weight is not tied:
            tables[id(module.weight)] = module.weight
    return list(tables.values())


def _is_bias(name: str) -> bool:
    return name in ("bias", "b") or name.startswith("b_") or name.endswith("_bias")


def without_attention(rules: Rules) -> Rules:
    """The same rules with attention's own derivative."""
    return replace(rules, logits=None, values=1.0, temperature=1.0)
