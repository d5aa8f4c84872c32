"""What a module computes by torch's fused attention, handed to somebody else while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from interp_hooks.call import AttentionCall, Site
from interp_hooks.errors import TapError
from interp_hooks.own_methods import wrapped
from interp_kernels import Mask

NAME = "scaled_dot_product_attention"
#: gives z (batch, queries, heads, d) of a call
Handler = Callable[[AttentionCall], torch.Tensor]
#: a call of it, as named arguments → (batch, heads, queries, d)
Answer = Callable[[dict[str, Any]], torch.Tensor]
_ARGUMENTS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)


class Fused(TorchFunctionMode):
    """Calls of `scaled_dot_product_attention` in this block are answered by `answer`."""

    def __init__(self, answer: Answer):
        super().__init__()
        self.answer = answer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != NAME:
            return func(*args, **kwargs)
        return self.answer({**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs})


def call_of(site: Site, given: Mapping[str, Any]) -> AttentionCall:
    """The attention call that its arguments say."""
    query, key = given["query"], given["key"]
    if given.get("dropout_p"):
        raise TapError(
            "The model is in training mode with attention dropout; call model.module.eval() first."
        )
    scale = given.get("scale")
    dense = given.get("attn_mask")
    if dense is not None:
        dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
        dense = dense.expand(*dense.shape[:2], query.shape[2], key.shape[2])
    return AttentionCall(
        site=site,
        query=query,
        key=key,
        value=given["value"],
        mask=Mask(causal=bool(given.get("is_causal")), dense=dense),
        scaling=query.shape[-1] ** -0.5 if scale is None else float(scale),
    )


#: who answers for a module now, the last one first; filled on entry of a block, emptied on exit
_LIVE: dict[int, list[Handler]] = {}


@contextmanager
def answered(modules: Mapping[Site, torch.nn.Module], handler: Handler) -> Iterator[None]:
    """Each module's fused attention goes to `handler` as its site's, over blocks that are open, in
    the thread of the block."""
    with ExitStack() as stack:
        for site, module in modules.items():
            live = _LIVE.setdefault(id(module), [])
            if not live:
                stack.callback(_LIVE.pop, id(module))
                stack.enter_context(wrapped(module, "forward", _forward(site, module)))
            live.append(handler)
            stack.callback(live.pop)
        yield


def _forward(site: Site, module: torch.nn.Module) -> Callable[..., Any]:
    """The module's forward, its attention answered by the last of its handlers."""
    own, handlers = module.forward, _LIVE[id(module)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen = 0

        def answer(given: dict[str, Any]) -> torch.Tensor:
            nonlocal seen
            seen += 1
            if seen > 1:
                raise TapError(
                    f"{type(module).__name__} ({site.path}) computes several attentions in one "
                    "forward, so that its heads can't be told apart."
                )
            z = handlers[-1](call_of(site, given))  # (batch, queries, heads, d)
            return z.transpose(1, 2).to(given["value"].dtype)

        with Fused(answer):
            out = own(*args, **kwargs)
        if not seen:
            raise TapError(
                f"{type(module).__name__} ({site.path}) computed no fused attention, so its heads "
                "were not seen; use the attention backend 'native'."
            )
        return out

    return forward
