"""A GPT-2 run edge by edge: which sender each input of each head, MLP and of the output hears from
another run.

Written by hand from the weights, with gradients: constructed truths are trained and proved by it,
apart from the hooks that circuit methods use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Ends = tuple[str, str]


@dataclass(frozen=True)
class Wires:
    """The edges of a GPT-2 of `n_layers` × `n_heads`.

    senders: "input", "L0H0", …, "MLP 0", "L1H0", …; receivers: (name, "q" | "k" | "v") of heads,
    ("MLP 0", ""), …, ("output", ""); the names of `interp.circuits` tables.
    """

    senders: tuple[str, ...]
    receivers: tuple[Ends, ...]
    #: (receivers, senders) bool: whose writing is there when it is read
    allowed: torch.Tensor

    @classmethod
    def of(cls, n_layers: int, n_heads: int) -> Wires:
        """Those of a GPT-2 of this size."""
        senders, receivers, before = ["input"], list[Ends](), list[int]()
        for layer in range(n_layers):
            heads = [f"L{layer}H{h}" for h in range(n_heads)]
            receivers += [(head, part) for part in "qkv" for head in heads]
            before += [len(senders)] * (3 * n_heads)
            senders += heads
            receivers.append((f"MLP {layer}", ""))
            before.append(len(senders))
            senders.append(f"MLP {layer}")
        receivers.append(("output", ""))
        before.append(len(senders))
        allowed = torch.arange(len(senders))[None] < torch.tensor(before)[:, None]
        return cls(tuple(senders), tuple(receivers), allowed)

    def mask(self, edges: Any) -> torch.Tensor:
        """(receivers, senders) bool: these (sender, receiver, part)."""
        found = torch.zeros_like(self.allowed)
        for sender, receiver, part in edges:
            found[self.receivers.index((str(receiver), part)), self.senders.index(str(sender))] = 1
        return found

    def edges(self, mask: torch.Tensor) -> list[tuple[str, str, str]]:
        """The (sender, receiver, part) of a mask (receivers, senders)."""
        return [
            (self.senders[u], *self.receivers[r])
            for r, u in (mask & self.allowed).nonzero().tolist()
        ]


def rewired(
    module: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    last: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, what each sender wrote) of a `GPT2LMHeadModel` in which masked edges carry `other`.

    The stream that a receiver reads is the sum of what the senders before it wrote; along a masked
    edge it is what `other` says instead.

    Args:
        module: without padding, dropout and cross-attention; MLPs and norms are its own.
        ids: (batch, tokens).
        mask: (receivers, senders), or (batch, receivers, senders), a row's own; as `Wires`.
        other: (senders, batch, tokens, width), as the second value of another run.
        last: only the logits of so many last positions.

    Returns:
        (batch, tokens, vocabulary) and (senders, batch, tokens, width).
    """
    core, config = module.transformer, module.config
    H, D = config.n_head, config.n_embd
    wrote = [core.wte(ids) + core.wpe(torch.arange(ids.shape[1], device=ids.device))]
    fixed = torch.zeros(D, dtype=wrote[0].dtype, device=ids.device)  # biases, which nobody sent
    if mask is not None:
        mask = mask.expand(len(ids), *mask.shape[-2:]).to(wrote[0])
    start = 0

    def streams(n: int) -> torch.Tensor:
        """(n, batch, tokens, width): what the next n receivers read; (1, …) where all read one."""
        nonlocal start
        rows, start = slice(start, start + n), start + n
        whole = (sum(wrote[1:], wrote[0]) + fixed)[None]
        if mask is None or other is None:
            return whole
        change = other[: len(wrote)] - torch.stack(wrote)
        return whole + torch.einsum("bru,ubtd->rbtd", mask[:, rows, : len(wrote)], change)

    for block in core.h:
        x = block.ln_1(streams(3 * H)).expand(3 * H, -1, -1, -1)
        W = block.attn.c_attn.weight.view(D, 3 * H, D // H)
        b = block.attn.c_attn.bias.view(3 * H, D // H)
        qkv = torch.einsum("hbtd,dhe->bhte", x, W) + b[:, None]
        q, k, v = qkv.split(H, 1)
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        W_O = block.attn.c_proj.weight.view(H, D // H, D)
        wrote += torch.einsum("bhte,hed->hbtd", z, W_O).unbind(0)
        fixed = fixed + block.attn.c_proj.bias
        wrote.append(block.mlp(block.ln_2(streams(1)[0])))
    final = core.ln_f(streams(1)[0])
    logits = module.lm_head(final if last is None else final[:, -last:])
    return logits, torch.stack(wrote)
