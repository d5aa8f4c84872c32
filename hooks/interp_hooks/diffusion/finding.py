"""The attentions of a diffusers model, found by running it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from interp_hooks.call import Site
from interp_hooks.diffusion.fused import Fused
from interp_hooks.errors import TapError


def sites_of(module: Any, run: Callable[[], Any]) -> dict[Site, torch.nn.Module]:
    """Site → module, in order of calls, of each module that calls torch's fused attention.

    A block is what stands around an attention; its attentions are one layer: "cross" where the keys
    are those of the text alone, "self" else (joint attention over a picture and a text is one). A
    second "self" of a block is a tower of its module's name.

    Raises `TapError` where none is found.
    """
    names = {id(part): name for name, part in module.named_modules()}
    running: list[tuple[torch.nn.Module, int | None]] = []  # and the tokens of its text
    found: dict[Site, torch.nn.Module] = {}
    layers: dict[str, int] = {}

    def enter(part: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        tokens = text.shape[1] if isinstance(text, torch.Tensor) and text.ndim == 3 else None
        running.append((part, tokens))

    def leave(part: torch.nn.Module, args: tuple, out: Any) -> None:
        running.pop()

    def see(given: dict[str, Any]) -> torch.Tensor:
        part, tokens = running[-1]
        path, query, key = names[id(part)], given["query"], given["key"]
        block = path.rpartition(".")[0]
        layer = layers.setdefault(block, len(layers))
        kind = "cross" if tokens == key.shape[2] else "self"
        taken = {(s.tower, s.layer, s.kind) for s in found}
        tower = "" if ("", layer, kind) not in taken else path.rpartition(".")[2]
        site = Site(tower, layer, kind, path, query.shape[1], key.shape[1], query.shape[3])
        found[site] = part
        return torch.nn.functional.scaled_dot_product_attention(**given)

    with ExitStack() as stack:
        for part in module.modules():
            if part is not module and next(part.parameters(), None) is not None:
                stack.callback(part.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(leave).remove)
        with Fused(see):
            run()
    if not any(site.kind == "self" for site in found):
        raise TapError(
            f"{type(module).__name__} calls no fused self-attention of torch's, by which models of "
            "diffusers are seen; choose the attention backend 'native' (linear attention has no "
            "weights to be seen)."
        )
    return found
