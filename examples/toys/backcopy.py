"""Bigram-Backcopy: attention sinks and value drains emerge in one layer (Guo et al. 2024, arXiv
2410.13835).

    python examples/toys/backcopy.py

Token 0 begins a sequence. After a plain token the next is drawn from a fixed bigram table; after a
trigger token it is the one before the trigger. A stock Llama of one layer and one head learns both:
the table needs no attention, the copy does. So the head is active on triggers and dormant
elsewhere, where its weight must go somewhere: to the first token, whose value it makes small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import interp

VOCABULARY, TRIGGERS, LENGTH = 20, 8, 32  # token 0 begins, 1 … 8 trigger, the others are plain


@dataclass(frozen=True)
class Trained:
    """Measured over training, on the same sequences.

    Attributes:
        steps: (n,).
        loss_plain, loss_trigger: (n,) nats, after plain tokens (above the table's own entropy) and
            after triggers.
        sink_plain, sink_trigger: (n,) attention of such rows to the first token.
        copied: (n,) attention of trigger rows to the token before.
        drain: (n,) ‖v‖ of the first token over the mean of the others.
        model: the trained model.
    """

    steps: torch.Tensor
    loss_plain: torch.Tensor
    loss_trigger: torch.Tensor
    sink_plain: torch.Tensor
    sink_trigger: torch.Tensor
    copied: torch.Tensor
    drain: torch.Tensor
    model: Any


def table(seed: int = 0) -> torch.Tensor:
    """(vocabulary, vocabulary) P(next | plain token): every token has a few likely successors."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    logits[:, 0] = -torch.inf
    return logits.softmax(-1)


def sequences(n: int, generator: torch.Generator, triggers: bool = True) -> torch.Tensor:
    """(n, LENGTH) tokens. Without triggers their rows follow the table too, the control."""
    chances = table()
    ids = torch.zeros(n, LENGTH, dtype=torch.long)
    ids[:, 1] = torch.randint(1 + TRIGGERS, VOCABULARY, (n,), generator=generator)
    for t in range(2, LENGTH):
        drawn = torch.multinomial(chances[ids[:, t - 1]], 1, generator=generator)[:, 0]
        ids[:, t] = torch.where(is_trigger(ids[:, t - 1]) & triggers, ids[:, t - 2], drawn)
    return ids


def is_trigger(ids: torch.Tensor) -> torch.Tensor:
    """bool of the same shape."""
    return (ids >= 1) & (ids <= TRIGGERS)


def model(seed: int = 0) -> Any:
    """A stock Llama of one layer and one head, at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def measured(hooked: Any, ids: torch.Tensor) -> dict[str, float]:
    """The numbers of `Trained` now."""
    n, rows = ids.shape[1] - 1, torch.arange(1, ids.shape[1] - 1)
    labels = torch.zeros(1, n, dtype=torch.long) - 1
    labels[:, 0] = 0
    before = (torch.arange(n) - 1).clamp_min(-1)[None, :, None].expand(len(ids), -1, -1)
    with hooked.observe(
        "group_mass", "value_norm", labels=labels, pairs={"before": before}
    ) as seen:
        logits = hooked.logits(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(len(ids), n)
    trigger = is_trigger(ids[:, :-1])[:, rows]
    sink = seen[0].group_mass[:, 0, :, 0][:, rows]  # (batch, rows)
    copied = seen[0].pair_mass["before"][:, 0][:, rows]
    value = seen[0].value_norm[:, 0]  # (batch, keys)
    chances = table()
    own = torch.special.entr(chances).sum(-1)[ids[:, :-1]][:, rows]
    loss = loss[:, rows]
    return dict(
        loss_plain=float((loss - own)[~trigger].mean()),
        loss_trigger=float(loss[trigger].mean()),
        sink_plain=float(sink[~trigger].mean()),
        sink_trigger=float(sink[trigger].mean()),
        copied=float(copied[trigger].mean()),
        drain=float(value[:, 0].mean() / value[:, 1:].mean()),
    )


def train(steps: int = 2000, seed: int = 0, batch: int = 64, triggers: bool = True) -> Trained:
    """Adam at a constant rate after 50 steps of warming up, on fresh sequences. `triggers` False:
    nothing has to be copied, the control."""
    generator = torch.Generator().manual_seed(seed)
    module = model(seed)
    hooked = interp.load(module)
    held = sequences(64, torch.Generator().manual_seed(99), triggers)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    taken, rows = [], []
    for step in range(steps + 1):
        if step % max(1, steps // 50) == 0:
            module.eval()
            taken.append(step)
            rows.append(measured(hooked, held))
        if step == steps:
            break
        ids = sequences(batch, generator, triggers)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50)
        module.train()
        loss = module(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    series = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return Trained(torch.tensor(taken), **series, model=hooked)


NAMES = ("loss_plain", "loss_trigger", "sink_plain", "sink_trigger", "copied", "drain")


def at_last(found: Trained) -> dict[str, float]:
    """The series' means over the last fifth of the measurements, which fluctuate."""
    n = max(1, len(found.steps) // 5)
    return {name: float(getattr(found, name)[-n:].mean()) for name in NAMES}


def main() -> None:
    torch.set_num_threads(1)
    for seed, triggers in ((0, True), (1, True), (2, True), (0, False)):
        found = train(seed=seed, triggers=triggers)
        last = {name: round(value, 3) for name, value in at_last(found).items()}
        print("triggers" if triggers else "control", last, flush=True)


if __name__ == "__main__":
    main()
