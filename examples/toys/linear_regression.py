"""In-context linear regression by one layer of softmax attention: what two heads learn.

    python examples/toys/linear_regression.py

A prompt is Z = [x_1 … x_L x_q; y_1 … y_L 0] with y = β·x + noise and a new β each time; the model
predicts y_q = Σ_h (O_h V_h Z) softmax(Zᵀ K_hᵀ Q_h z_q) in its last row, the query left out of the
keys. He et al. 2025 (arXiv 2503.12734) find that training, whatever the start, leads to

- K_hᵀQ_h = diag(ω_h, …, ω_h, 0): the same multiple of the identity on x, nothing on y;
- O_hV_h with one entry, μ_h, which reads y into the answer;
- heads in pairs: sign ω_h = sign μ_h, ω of one size, Σ_h μ_h = 0, so that constants cancel and the
  sum is a step of gradient descent, ŷ = η/L Σ y_i x_i·x_q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DIM, LENGTH, NOISE = 5, 40, 0.1


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes:
        losses: (steps,) squared errors of the batches.
        kq, ov: (heads, d + 1, d + 1) KᵀQ and OV.
        steps: at which `omegas` and `mus` (n, heads) were taken.
        omegas: the mean of KᵀQ's diagonal on x.
        mus: OV's last entry.
    """

    losses: torch.Tensor
    kq: torch.Tensor
    ov: torch.Tensor
    steps: list[int]
    omegas: torch.Tensor
    mus: torch.Tensor


def prompts(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """((n, d + 1, L + 1) prompts, (n,) answers)."""
    x = torch.randn(n, DIM, LENGTH + 1, generator=generator)
    beta = torch.randn(n, 1, DIM, generator=generator) / DIM**0.5
    y = (beta @ x)[:, 0]  # (n, L + 1)
    noisy = y + NOISE * torch.randn(y.shape, generator=generator)
    z = torch.cat([x, noisy[:, None]], 1)
    z[:, -1, -1] = 0.0
    return z, y[:, -1]


def predicted(z: torch.Tensor, kq: torch.Tensor, ov: torch.Tensor) -> torch.Tensor:
    """(n,) answers of KᵀQ and OV (heads, d + 1, d + 1)."""
    keys, query = z[..., :-1], z[..., -1]
    logits = torch.einsum("nik,hij,nj->nhk", keys, kq, query)
    weights = logits.softmax(-1)  # (n, heads, L)
    return torch.einsum("hj,njk,nhk->n", ov[:, -1], keys, weights)


def descent(z: torch.Tensor) -> torch.Tensor:
    """(n,) answers of the best single step of gradient descent, ŷ = η/L Σ y_i x_i·x_q."""
    x, y, query = z[:, :-1, :-1], z[:, -1, :-1], z[:, :-1, -1]
    step = torch.einsum("ndk,nk,nd->n", x, y, query) / LENGTH
    eta = 1 / (1 + (1 + NOISE**2 * DIM + DIM) / LENGTH)
    return eta * step


def train(heads: int = 2, steps: int = 4000, seed: int = 0, batch: int = 256) -> Trained:
    """Adam on fresh prompts, from small random matrices."""
    generator = torch.Generator().manual_seed(seed)
    size = (heads, DIM + 1, DIM + 1)
    k, q, o, v = ((0.3 * torch.randn(size, generator=generator)).requires_grad_() for _ in range(4))
    optimizer = torch.optim.Adam([k, q, o, v], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, taken, omegas, mus = [], [], [], []
    for step in range(steps):
        z, answer = prompts(batch, generator)
        kq, ov = k.transpose(1, 2) @ q, o @ v
        loss = (predicted(z, kq, ov) - answer).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % max(1, steps // 100) == 0 or step == steps - 1:
            taken.append(step)
            omegas.append(kq.detach().diagonal(dim1=1, dim2=2)[:, :-1].mean(1))
            mus.append(ov.detach()[:, -1, -1])
    kq, ov = (k.transpose(1, 2) @ q).detach(), (o @ v).detach()
    return Trained(torch.tensor(losses), kq, ov, taken, torch.stack(omegas), torch.stack(mus))


@torch.no_grad()
def errors(found: Trained, n: int = 4096, seed: int = 99) -> dict[str, float]:
    """Mean squared error on new prompts: of the model, of one step of descent, of ridge regression
    (the best there is), and of the answer 0."""
    z, answer = prompts(n, torch.Generator().manual_seed(seed))
    x, y, query = z[:, :-1, :-1], z[:, -1, :-1], z[:, :-1, -1]
    gram = x @ x.transpose(1, 2) + NOISE**2 * DIM * torch.eye(DIM)
    beta = torch.linalg.solve(gram, (x @ y[..., None]))[..., 0]
    answers = {
        "two heads": predicted(z, found.kq, found.ov),
        "one step of descent": descent(z),
        "ridge regression": (beta * query).sum(1),
        "zero": torch.zeros(n),
    }
    return {name: float((made - answer).square().mean()) for name, made in answers.items()}


def patterns(found: Trained) -> dict[str, float]:
    """How much of the matrices the pattern leaves out, as shares of what it holds: KᵀQ off the
    diagonal and in its last row, the spread of the diagonal; OV's last row beside its last entry;
    and how well the heads pair. KᵀQ's last column is multiplied by the query's y, which is 0: it
    does nothing and stays as it was drawn."""
    kq, ov = found.kq, found.ov
    inside = kq[:, :-1, :-1]
    diagonal = inside.diagonal(dim1=1, dim2=2)
    omega = diagonal.mean(1)
    off = inside - torch.diag_embed(diagonal)
    edge = kq[:, -1, :-1]
    mu = ov[:, -1, -1]
    return dict(
        off_diagonal=float((off.abs().amax((1, 2)) / omega.abs()).max()),
        last_row=float((edge.abs().amax(1) / omega.abs()).max()),
        spread=float((diagonal.std(1) / omega.abs()).max()),
        beside_the_entry=float((ov[:, -1, :-1].abs().amax(1) / mu.abs()).max()),
        sum_of_mu=float(mu.sum().abs() / mu.abs().max()),
        sum_of_omega=float(omega.sum().abs() / omega.abs().max()),
        signs_agree=float((omega.sign() == mu.sign()).float().mean()),
    )


def main() -> None:
    torch.set_num_threads(1)
    found = train()
    print("errors", {k: round(v, 3) for k, v in errors(found).items()})
    print("ω", found.omegas[-1].tolist(), "μ", found.mus[-1].tolist())
    print({k: round(v, 3) for k, v in patterns(found).items()})


if __name__ == "__main__":
    main()
