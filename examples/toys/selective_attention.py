"""Does a temperature of each token keep attention together on long rows? (Zhang et al. 2024, arXiv
2411.12892)

    python examples/toys/selective_attention.py

A small stock Llama learns to copy rows of 4 to 16 random tokens (the row, a mark, the row again)
and is then asked for longer ones. `interp.nn.SelectiveTemperature` on its queries and values, whole
and in parts, against the plain model, with the same seeds, rows and steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import interp
from interp.nn import selective

VOCABULARY = 32  # token 0 is the mark
#: tokens of the row that is copied: in training, and when asked
SHORT, LONG, ASKED = 4, 16, (16, 32, 64)
#: name → settings of `selective`; none for the plain model
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "position": dict(token=False),
    "token": dict(position=False),
    "token and position": dict(),
    "token and position, queries alone": dict(projections=("q_proj",)),
}


@dataclass(frozen=True)
class Asked:
    """What a trained model does with rows of one length.

    Attributes:
        loss: nats a token of the second row.
        entropy: mean over layers, heads and rows of the second half, in nats.
        spread: that entropy as a share of ln (keys that the row sees).
    """

    loss: float
    entropy: float
    spread: float


def model(seed: int) -> Any:
    """A stock Llama of two layers with four heads each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2 * ASKED[-1] + 1,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def rows(n: int, half: int, generator: torch.Generator) -> torch.Tensor:
    """(n, 2·half + 1) tokens: a row, the mark 0, the row again."""
    row = torch.randint(1, VOCABULARY, (n, half), generator=generator)
    return torch.cat([row, torch.zeros(n, 1, dtype=torch.long), row], 1)


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(): the mean loss of the second row, logits (rows, 2·half, vocabulary)."""
    half = ids.shape[1] // 2
    wanted = ids[:, half + 1 :]
    return torch.nn.functional.cross_entropy(logits[:, half:].flatten(0, 1), wanted.flatten())


def train(way: str, seed: int, steps: int = 500, lr: float = 3e-3, batch: int = 48) -> Any:
    """The model after Adam at a rate that falls to 0; every way sees the same rows."""
    module = model(seed)
    settings = WAYS[way]
    if settings is not None:
        selective(module, **settings)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    module.train()
    for step in range(steps):
        half = int(torch.randint(SHORT, LONG + 1, (), generator=generator))
        ids = rows(batch, half, generator)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        loss = loss_of(module(input_ids=ids[:, :-1]).logits, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


@torch.no_grad()
def ask(module: Any, half: int, n: int = 64) -> Asked:
    """Loss and entropy on held-out rows of a length."""
    ids = rows(n, half, torch.Generator().manual_seed(99))
    hooked = interp.load(module)
    with hooked.observe("entropy") as seen:
        logits = hooked.logits(ids[:, :-1])
    entropy = torch.stack([layer.entropy[..., half:] for layer in seen])  # (layers, n, heads, half)
    keys = torch.arange(half + 1, 2 * half + 1).double().log()
    return Asked(
        float(loss_of(logits, ids)),
        float(entropy.double().mean()),
        float((entropy.double() / keys).mean()),
    )


def main(seeds: int = 3, steps: int = 500) -> None:
    torch.set_num_threads(1)
    for way in WAYS:
        found = []
        for seed in range(seeds):
            module = train(way, seed, steps)
            found.append([ask(module, half) for half in ASKED])
        for at, half in enumerate(ASKED):
            loss = ", ".join(f"{one[at].loss:.3f}" for one in found)
            entropy = ", ".join(f"{one[at].entropy:.2f}" for one in found)
            spread = ", ".join(f"{one[at].spread:.2f}" for one in found)
            print(f"{way}: row of {half}: loss {loss}; entropy {entropy}; of ln keys {spread}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
