"""A reference that knows nothing of the toolkit: models of which each head's q, k, v and each MLP
read a stream of their own, by plain hooks on the modules that transformers names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import tiny
import torch


class RMS(torch.nn.Module):
    """RMSNorm in the precision of its input (transformers' own works in float32)."""

    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def exact(model: Any) -> Any:
    """An untapped copy that computes in float64 throughout."""
    twin = tiny.eager(model).double()
    twin.set_attn_implementation("sdpa")  # the eager one takes its softmax in float32
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if hasattr(child, "variance_epsilon"):
                setattr(module, name, RMS(child.weight, child.variance_epsilon))
    return twin


HEADS = 4
KV = dict.fromkeys(("llama", "qwen2", "mistral", "gemma3", "granite"), 2)
KV |= {"gpt2": 4, "neox": 4, "opt": 4}


def parts(name: str, model: Any) -> tuple[list[Any], Any, list[dict[str, Any]]]:
    """(blocks, final norm, [norm before attention, norm before the MLP, attention, MLP] of each
    block)."""
    if name == "gpt2":
        trunk = model.transformer
        named = [dict(ln=b.ln_1, ln_mlp=b.ln_2, attn=b.attn, mlp=b.mlp) for b in trunk.h]
        return list(trunk.h), trunk.ln_f, named
    if name == "neox":
        trunk = model.gpt_neox
        named = [
            dict(
                ln=b.input_layernorm, ln_mlp=b.post_attention_layernorm, attn=b.attention, mlp=b.mlp
            )
            for b in trunk.layers
        ]
        return list(trunk.layers), trunk.final_layer_norm, named
    trunk = model.model
    named = [
        dict(ln=b.input_layernorm, ln_mlp=b.post_attention_layernorm, attn=b.self_attn, mlp=b.mlp)
        for b in trunk.layers
    ]
    return list(trunk.layers), trunk.norm, named


def columns(name: str, place: str, head: int, d: int) -> tuple[str, slice]:
    """(projection, the columns of its output that are one head's queries, keys or values)."""
    number = "qkv".index(place)
    if name == "gpt2":
        return "c_attn", slice((number * HEADS + head) * d, (number * HEADS + head + 1) * d)
    if name == "neox":
        return "query_key_value", slice((head * 3 + number) * d, (head * 3 + number + 1) * d)
    return f"{place}_proj", slice(head * d, (head + 1) * d)


class Split:
    """Runs `model` with edges replaced. Senders: "input", (layer, head), ("mlp", layer); receivers:
    (layer, place, head), ("mlp", layer), "output"."""

    def __init__(self, name: str, model: Any):
        self.name, self.model = name, model
        #: what a sender's output becomes before it is added to the stream
        self.written: Any = lambda sender, output: output
        self.blocks, self.final, self.named = parts(name, model)
        self.layers = range(len(self.blocks))
        self.d = 8
        self.senders: list[Any] = ["input"]
        self.edges: list[
            tuple[Any, Any]
        ] = []  # in the order in which ACDC takes receivers, back to front
        for layer in self.layers:
            before = list(self.senders)
            heads = [(layer, h) for h in range(HEADS)]
            for place in "qkv":
                for h in range(HEADS if place == "q" else KV[name]):
                    self.edges += [(u, (layer, place, h)) for u in before]
            self.edges += [
                (u, ("mlp", layer)) for u in (before if name == "neox" else before + heads)
            ]
            self.senders += [*heads, ("mlp", layer)]
        self.edges += [(u, "output") for u in self.senders]

    @torch.no_grad()
    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        stand_ins: Mapping[Any, torch.Tensor] | None = None,
        weights: Mapping[tuple[Any, Any], float] | None = None,
    ) -> tuple[torch.Tensor, dict[Any, torch.Tensor]]:
        """(logits, sender → what it writes). The input of v: the stream + Σ weights[u, v] ·
        (stand_ins[u] − u now)."""
        now: dict[Any, torch.Tensor] = {}
        weights = dict(weights or {})

        def moved(stream: torch.Tensor, receiver: Any) -> torch.Tensor:
            for (u, v), weight in weights.items():
                if v == receiver:
                    stream = stream + weight * (stand_ins[u] - now[u])  # type: ignore[index]
            return stream

        pre: dict[int, torch.Tensor] = {}

        def enters(layer: int) -> Any:
            def hook(module: Any, args: tuple, kwargs: dict) -> None:
                pre[layer] = args[0] if args else kwargs["hidden_states"]
                if layer == 0:
                    now["input"] = pre[0]

            return hook

        def projects(layer: int, projection: str) -> Any:
            def hook(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
                output = output.clone()
                for place in "qkv":
                    for h in range(HEADS if place == "q" else KV[self.name]):
                        where, part = columns(self.name, place, h, self.d)
                        if where == projection and any(v == (layer, place, h) for _, v in weights):
                            stream = self.named[layer]["ln"](moved(pre[layer], (layer, place, h)))
                            output[..., part] = plain(module, stream)[..., part]
                return output

            return hook

        def plain(module: Any, x: torch.Tensor) -> torch.Tensor:
            """The projection without its hooks."""
            return module.forward(x)

        def writes(layer: int) -> Any:
            def hook(module: Any, args: tuple) -> None:
                z, weight = (
                    args[0],
                    module.weight if type(module).__name__ == "Conv1D" else module.weight.T,
                )
                for h in range(HEADS):
                    own = slice(h * self.d, (h + 1) * self.d)
                    now[layer, h] = self.written((layer, h), z[..., own] @ weight[own])

            return hook

        def reads(receiver: Any) -> Any:
            return lambda module, args: (moved(args[0], receiver),)

        def gives(layer: int) -> Any:
            def hook(module: Any, args: tuple, output: torch.Tensor) -> None:
                now["mlp", layer] = self.written(("mlp", layer), output)

            return hook

        with ExitStack() as stack:
            for layer, part in enumerate(self.named):
                hooks = [
                    self.blocks[layer].register_forward_pre_hook(enters(layer), with_kwargs=True)
                ]
                for projection in {columns(self.name, place, 0, self.d)[0] for place in "qkv"}:
                    module = getattr(part["attn"], projection)
                    hooks.append(module.register_forward_hook(projects(layer, projection)))
                hooks.append(
                    tiny.output_module(part["attn"]).register_forward_pre_hook(writes(layer))
                )
                hooks.append(part["ln_mlp"].register_forward_pre_hook(reads(("mlp", layer))))
                hooks.append(part["mlp"].register_forward_hook(gives(layer)))
                for handle in hooks:
                    stack.callback(handle.remove)
            stack.callback(self.final.register_forward_pre_hook(reads("output")).remove)
            logits = self.model(**inputs, use_cache=False).logits
        return logits, now


def label(name: str, sender: Any) -> str:
    """A sender as the toolkit writes it."""
    if sender == "input":
        return "input"
    return f"MLP {sender[1]}" if sender[0] == "mlp" else f"L{sender[0]}H{sender[1]}"


def edge_label(name: str, edge: tuple[Any, Any]) -> tuple[str, str, str]:
    """(sender, receiver, kind) as the toolkit writes them."""
    sender, receiver = edge
    if receiver == "output":
        return label(name, sender), "output", ""
    if receiver[0] == "mlp":
        return label(name, sender), f"MLP {receiver[1]}", ""
    layer, place, head = receiver
    letters = "KV" if place != "q" and KV[name] < HEADS else "H"
    return label(name, sender), f"L{layer}{letters}{head}", place
