"""DuoAttention's learned head gates: gradient descent through the edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from interp.calibration.calibration_method import Found, Method
from interp.calibration.splits import Bench
from interp.edits.gate import Gate
from interp.errors import InputError
from interp.inputs.forward import forward
from interp.inputs.tokenizer import pad_id
from interp.support.checkpoints import Record
from interp.tasks.task import Instance, collate
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class GateTraining(Method):
    """A gate α ∈ [0, 1] for each KV head, z ← α·z + (1 − α)·z_streaming, learned by AdamW
    (DuoAttention, Xiao et al., ICLR 2025, arXiv 2410.10819):

        loss = distance to the untouched model on the answer tokens + λ · mean |α|,
        α = 1 at first.

    The weights stay as they are. In the end the `sparsity` share of heads with the smallest α
    streams (α = 0) and the rest has full attention (α = 1); `sparsity=None` keeps the α learned.

    Args:
        steps, rate: of AdamW (no weight decay); the rate ramps up over the first fifth and down
            over the last one, from and to a tenth. batch: instances a step. penalty: λ.
        sink, recent: of the streaming attention; choose them well below the prompts' length.
        distance: "hidden", mean square over last hidden states; "kl", of the logits.
        sparsity: share of KV heads that stream, or None.

    Misleads:
        It learns on short prompts with few steps (the paper: 2,000 on long ones): which heads need
        all keys at 32,768 tokens it does not know.
    """

    steps: int = 100
    rate: float = 0.02
    penalty: float = 0.05
    batch: int = 1
    sink: int = 16
    recent: int = 64
    distance: Literal["hidden", "kl"] = "hidden"
    sparsity: float | None = 0.5

    name = "gates"
    summary = "which KV heads need full attention (DuoAttention's gates)"
    citation = "Xiao et al., ICLR 2025, arXiv 2410.10819"
    usual_task = "niah"
    needs_labels = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.rate <= 0 or self.penalty < 0:
            raise InputError(
                "Steps and batch of gates are at least 1, the rate is above 0, λ not negative."
            )
        if self.distance not in ("hidden", "kl"):
            raise InputError(f"The distance of gates is 'hidden' or 'kl', not {self.distance!r}.")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise InputError(
                "The sparsity of gates is the share of heads that stream, 0 to 1, not "
                f"{self.sparsity}."
            )
        Gate(1.0, self.sink, self.recent)

    def check(self, model: HookedModel, train: Sequence[Instance]) -> None:
        shortest = min(len(i.prompt) for i in train)
        if shortest <= self.sink + self.recent:
            raise InputError(
                f"The shortest prompt has {shortest} tokens, of which streaming attention with "
                f"sink {self.sink} and "
                f"recent {self.recent} sees all; use longer prompts or smaller numbers."
            )

    def find(self, bench: Bench) -> Found:
        import pandas as pd

        model, n = bench.model, len(bench.train)
        bench.plan(steps=self.steps * self.batch)
        alpha = torch.nn.Parameter(
            torch.ones(model.n_layers, model.n_kv_heads, device=model.device)
        )
        optimiser = torch.optim.AdamW([alpha], lr=self.rate, weight_decay=0.0)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(bench.seed)).tolist()
        trace: list[dict[str, float]] = []
        with _frozen(model):
            for step in range(self.steps):
                key, rate = f"step-{step:05d}", self.rate * ramp(step, self.steps)
                if bench.pieces.has(key):
                    trace.append(restore(bench.pieces.records([key]), alpha, optimiser, step))
                else:
                    instances = [
                        bench.train[order[(step * self.batch + i) % n]] for i in range(self.batch)
                    ]
                    for group in optimiser.param_groups:
                        group["lr"] = rate
                    optimiser.zero_grad()
                    distance = self.difference(model, instances, alpha)
                    loss = distance + self.penalty * alpha.abs().mean()
                    loss.backward()
                    optimiser.step()
                    with torch.no_grad():
                        alpha.clamp_(0, 1)
                    trace.append(
                        dict(step=step, loss=loss.item(), distance=distance.item(), rate=rate)
                    )
                    bench.pieces.save(key, checkpoint(trace[-1], alpha, optimiser))
                trace[-1]["mean_alpha"] = float(alpha.detach().mean())
                bench.step(f"step {step + 1}, loss {trace[-1]['loss']:.3g}", self.batch)
        learned = alpha.detach().cpu()
        final = learned if self.sparsity is None else binarised(learned, self.sparsity)
        edit = Gate(
            {
                (s.layer, h): float(final[s.layer, h])
                for s in _sites(model)
                for h in range(s.n_kv_heads)
            },
            self.sink,
            self.recent,
        )
        trials = pd.DataFrame(
            [
                dict(
                    layer=s.layer,
                    kv_head=h,
                    alpha=float(learned[s.layer, h]),
                    gate=float(final[s.layer, h]),
                )
                for s in _sites(model)
                for h in range(s.n_kv_heads)
            ]
        )
        return Found([edit], trials, pd.DataFrame(trace))

    def difference(
        self, model: HookedModel, instances: Sequence[Instance], alpha: torch.Tensor
    ) -> torch.Tensor:
        """The distance between the model under the gates and the untouched one, on the answer
        tokens; differentiable in `alpha` (layers, kv_heads)."""
        batch = collate(instances, pad_id(model.tokenizer))
        judged = [
            [p + o for p in i.positions] for i, o in zip(instances, batch.offset, strict=True)
        ]
        rows = torch.tensor([b for b, places in enumerate(judged) for _ in places])
        columns = torch.tensor([p for places in judged for p in places])

        def run() -> torch.Tensor:
            more: dict[str, Any] = (
                dict(output_hidden_states=True) if self.distance == "hidden" else {}
            )
            out = forward(model, batch.input_ids, batch.attention_mask, **more)
            if self.distance == "kl":
                values = logits_of(out)
            elif getattr(out, "hidden_states", None):
                values = out.hidden_states[-1]
            else:
                raise InputError(
                    f"{model.name} does not give its hidden states; use distance='kl'."
                )
            return values[rows, columns].to(torch.promote_types(values.dtype, torch.float32))

        with torch.no_grad():
            target = run()
        with model.edit(Gate(alpha, self.sink, self.recent)):
            output = run()
        if self.distance == "hidden":
            return (output - target).pow(2).mean()
        log_p, log_q = torch.log_softmax(target, -1), torch.log_softmax(output, -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def ramp(step: int, steps: int) -> float:
    """The share of the learning rate: up over the first fifth, down over the last one, at least
    0.1."""
    fifth = max(1, steps // 5)
    return max(0.1, min(1.0, (step + 1) / fifth, (steps - step) / fifth))


def binarised(alpha: torch.Tensor, sparsity: float) -> torch.Tensor:
    """0 for the `sparsity` share of smallest α (the first ones on a tie), 1 for the rest."""
    flat = alpha.flatten()
    order = torch.argsort(flat, stable=True)
    gates = torch.ones_like(flat)
    gates[order[: round(sparsity * len(flat))]] = 0
    return gates.reshape(alpha.shape)


def checkpoint(
    trace: dict[str, float], alpha: torch.Tensor, optimiser: torch.optim.Optimizer
) -> list[Record]:
    """A step as records: what the trace says, α, and AdamW's moments."""
    state = optimiser.state[alpha]
    records = [Record(k, 0, "", "trace", 0, 0, float(v)) for k, v in trace.items()]
    for name, tensor in (
        ("alpha", alpha),
        ("exp_avg", state["exp_avg"]),
        ("exp_avg_sq", state["exp_avg_sq"]),
    ):
        for layer, values in enumerate(tensor.detach().cpu().double().tolist()):
            records += [
                Record(name, 0, "", "gate", layer, head, value) for head, value in enumerate(values)
            ]
    return records


@torch.no_grad()
def restore(
    records: pd.DataFrame, alpha: torch.Tensor, optimiser: torch.optim.Optimizer, step: int
) -> dict[str, float]:
    """The trace of a finished step; α and the optimiser are put to where it left them."""
    by_name: dict[str, torch.Tensor] = {}
    for name, part in records[records.kind == "gate"].groupby("score"):
        values = torch.tensor(
            part.sort_values(["layer", "head"]).value.to_numpy(), dtype=torch.float64
        )
        by_name[str(name)] = values.reshape(alpha.shape).to(alpha)
    alpha.copy_(by_name["alpha"])
    optimiser.state[alpha].update(
        step=torch.tensor(float(step + 1)),
        exp_avg=by_name["exp_avg"],
        exp_avg_sq=by_name["exp_avg_sq"],
    )
    lines = records[records.kind == "trace"]
    trace = dict(zip(lines.score, lines.value, strict=True))
    return dict(trace, step=step)


def _sites(model: HookedModel) -> list[Any]:
    main = "" if "" in model.towers else "text" if "text" in model.towers else model.towers[0]
    return [s for s in model.sites if s.tower == main and s.kind == "self"]


class _frozen:
    """The model's weights take no gradients inside."""

    def __init__(self, model: HookedModel):
        self._were = [p for p in model.module.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for p in self._were:
            p.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for p in self._were:
            p.requires_grad_(True)
