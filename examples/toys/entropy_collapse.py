"""Attention entropy collapse, and σReparam against it (Zhai et al. 2023, arXiv 2303.06296).

    python examples/toys/entropy_collapse.py

A small stock Llama learns to copy: a row of random tokens, a mark, the row again. At a learning
rate that is too large for it the logits of attention run away, each row rests on one key whatever
it asks, entropy falls to 0 and the loss stays up. `interp.nn.SigmaReparam` on its linear layers is
what the paper puts against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import interp
from interp.nn import reparametrise

VOCABULARY, HALF, LAYERS = 32, 16, 2  # token 0 is the mark


@dataclass(frozen=True)
class Trained:
    """Measured over training.

    Attributes:
        steps: (n,).
        loss: (n,) nats a token of the second row.
        entropy: (n, layers, heads) mean entropy of attention rows, nats.
        norm: (n, layers) spectral norm of the query's projection.
    """

    steps: torch.Tensor
    loss: torch.Tensor
    entropy: torch.Tensor
    norm: torch.Tensor


def rows(n: int, generator: torch.Generator) -> torch.Tensor:
    """(n, 2·HALF + 1) tokens: a row, the mark, the row again."""
    row = torch.randint(1, VOCABULARY, (n, HALF), generator=generator)
    return torch.cat([row, torch.zeros(n, 1, dtype=torch.long), row], 1)


def model(seed: int, sigma: bool) -> Any:
    """A stock Llama of two layers with four heads each; with σReparam on its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * HALF + 1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    made = LlamaForCausalLM(config)
    if sigma:
        reparametrise(made, lambda name: name != "lm_head")
    return made


def train(
    lr: float, sigma: bool = False, steps: int = 600, seed: int = 0, batch: int = 64
) -> Trained:
    """Adam at a constant rate after 20 steps of warming up."""
    generator = torch.Generator().manual_seed(seed)
    module = model(seed, sigma)
    hooked = interp.load(module)
    held = rows(64, torch.Generator().manual_seed(99))
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    kept: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []
    for step in range(steps + 1):
        if step % max(1, steps // 30) == 0:
            module.eval()
            with torch.no_grad(), hooked.observe("entropy") as seen:
                logits = hooked.logits(held[:, :-1])
            entropy = torch.stack([layer.entropy.mean((0, 2)) for layer in seen])
            norms = []
            for block in module.model.layers:
                q = block.self_attn.q_proj
                weight = q.effective() if sigma else q.weight
                norms.append(torch.linalg.matrix_norm(weight.detach(), 2))
            kept.append((step, copying(logits, held), entropy, torch.stack(norms)))
        if step == steps:
            break
        ids = rows(batch, generator)
        module.train()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        logits = module(input_ids=ids[:, :-1]).logits[:, HALF:]
        wanted = ids[:, HALF + 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    taken, losses, entropies, norms_ = zip(*kept, strict=True)
    return Trained(
        torch.tensor(taken), torch.tensor(losses), torch.stack(entropies), torch.stack(norms_)
    )


def copying(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """The mean loss of the second row."""
    return float(
        torch.nn.functional.cross_entropy(
            logits[:, HALF:].flatten(0, 1), ids[:, HALF + 1 :].flatten()
        )
    )


def main() -> None:
    torch.set_num_threads(1)
    for lr in (1e-3, 1e-2, 1e-1):
        for sigma in (False, True):
            found = train(lr, sigma)
            print(
                f"rate {lr:g} {'σReparam' if sigma else 'plain':9} loss {found.loss[-1]:.3f} "
                f"entropy {found.entropy[-1].min():.3f} … {found.entropy[-1].max():.3f} "
                f"(at first {found.entropy[0].mean():.2f}) ‖W_q‖ {found.norm[-1].max():.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
