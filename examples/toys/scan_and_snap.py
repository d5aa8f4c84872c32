"""Scan and snap: one layer's attention from uniform to sparse (Tian et al. 2023, arXiv 2305.16380).

    python examples/toys/scan_and_snap.py

A sequence is a set of tokens and the last token, here always the same; the next token is one of two
classes. Tokens are *distinct* (of one class) or *common* (as frequent in both). The model, with
token frequencies f (vocabulary,) of a sequence:

    c_l ∝ f_l·exp(z_l)      attention to a token type, Σ_l c_l = 1
    logits = Y·c / ‖c‖      the decoder, trained faster than the attention

SGD does what the paper proves. Scan: attention leaves common tokens, and among distinct ones grows
with how often they stand beside the class. Snap: as the decoder is sure, it stands still, before it
rests on one token alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DISTINCT, COMMON, LENGTH = 4, 8, 128
VOCABULARY = 2 * DISTINCT + COMMON


@dataclass(frozen=True)
class Trained:
    """Attention over training.

    Attributes:
        steps: at which the rest was taken, (n,).
        attention: (n, vocabulary) c of the mean frequencies of the first class.
        z: (n, vocabulary) its logits.
        losses: (n,).
        frequencies: (classes, vocabulary) how often tokens stand beside a class.
    """

    steps: torch.Tensor
    attention: torch.Tensor
    z: torch.Tensor
    losses: torch.Tensor
    frequencies: torch.Tensor


def frequencies() -> torch.Tensor:
    """(2, vocabulary): tokens 0 … 3 are of the first class, 4 … 7 of the second, the others common.
    Half of a sequence is common; distinct tokens come by 4 : 3 : 2 : 1."""
    table = torch.zeros(2, VOCABULARY)
    ranks = torch.arange(DISTINCT, 0, -1.0)
    for one in range(2):
        table[one, one * DISTINCT : (one + 1) * DISTINCT] = 0.5 * ranks / ranks.sum()
    table[:, 2 * DISTINCT :] = 0.5 / COMMON
    return table


def attention(f: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """c (…, vocabulary) of frequencies f."""
    weights = f * z.exp()
    return weights / weights.sum(-1, keepdim=True)


def train(
    ratio: float = 1.0,
    steps: int = 3000,
    seed: int = 0,
    batch: int = 64,
    lr: float = 1.0,
    shuffled: bool = False,
) -> Trained:
    """SGD on sampled sequences from uniform attention; the decoder learns `ratio` times as fast.
    `shuffled`: the classes are dealt out anew, the control."""
    generator = torch.Generator().manual_seed(seed)
    table = frequencies()
    z = torch.zeros(VOCABULARY, requires_grad=True)
    y = torch.zeros(2, VOCABULARY, requires_grad=True)
    optimizer = torch.optim.SGD([dict(params=[z], lr=lr), dict(params=[y], lr=ratio * lr)])
    kept: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []
    for step in range(steps):
        label = torch.randint(0, 2, (batch,), generator=generator)
        drawn = torch.multinomial(table[label], LENGTH, replacement=True, generator=generator)
        f = torch.nn.functional.one_hot(drawn, VOCABULARY).float().mean(1)
        if shuffled:
            label = label[torch.randperm(batch, generator=generator)]
        c = attention(f, z)
        logits = c / c.norm(dim=-1, keepdim=True) @ y.T
        loss = torch.nn.functional.cross_entropy(logits, label)
        if step < 50 or step % max(1, steps // 100) == 0 or step == steps - 1:
            now = z.detach().clone()
            kept.append((step, attention(table[0], now), now, float(loss.detach())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    taken, c_s, z_s, losses = zip(*kept, strict=True)
    return Trained(
        torch.tensor(taken), torch.stack(c_s), torch.stack(z_s), torch.tensor(losses), table
    )


def findings(found: Trained) -> dict[str, float]:
    """Attention to common tokens at first and at last; how the logits of the first class's distinct
    tokens stand to their frequencies (Spearman's ρ); entropy at first, at last and if one token had
    all; and how much z moved in the last half of the steps, as a share of all its way."""
    from scipy.stats import spearmanr

    c, z = found.attention, found.z
    common = c[:, 2 * DISTINCT :].sum(1)
    entropy = torch.special.entr(c).sum(1)
    own = slice(0, DISTINCT)
    way = (z[1:] - z[:-1]).norm(dim=1)
    half = int((found.steps < found.steps[-1] / 2).sum())
    return dict(
        common_first=float(common[0]),
        common_last=float(common[-1]),
        by_frequency=float(spearmanr(z[-1, own], found.frequencies[0, own])[0]),
        entropy_first=float(entropy[0]),
        entropy_last=float(entropy[-1]),
        moved_in_second_half=float(way[half:].sum() / way.sum()),
        loss_last=float(found.losses[-1]),
    )


def main() -> None:
    torch.set_num_threads(1)
    for ratio in (0.1, 1.0, 10.0):
        found = train(ratio)
        print(ratio, {k: round(v, 3) for k, v in findings(found).items()})
        print([round(x, 2) for x in found.z[-1].tolist()])
    control = findings(train(shuffled=True))
    print("shuffled", {k: round(v, 3) for k, v in control.items()})


if __name__ == "__main__":
    main()
