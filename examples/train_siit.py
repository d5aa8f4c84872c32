"""Train the `siit_…` models: small GPT-2s whose nodes keep the variables of a program.

    python examples/train_siit.py siit_ioi siit_pointer siit_induction

Strict interchange intervention training (Gupta et al. 2024, InterpBench, arXiv 2407.14494; Geiger
et al. 2022, arXiv 2112.00826), edge by edge. Every step answers a batch of sources as they are, and
a batch of bases in which, row by row,

* some aligned nodes write what they wrote for a source: the answer must be the program's with those
  variables taken from the source (interchange);
* some edges outside the circuit, or all, carry what they carried for the source: the answer must
  stay (strictness; InterpBench swaps whole nodes).

One loss, the cross-entropy with the program's answer. Before that, for --alone steps, the circuit
answers alone: along the edges outside it come another prompt's embeddings and nothing else, so that
the variables begin where they belong; from random weights the other heads learn the program first,
and the loss stays there. Matrices begin four times as large as GPT-2's: at its usual .02
attention of this width is even for thousands of steps. What was reached is measured with whole nodes
swapped, on prompts of another seed, and goes into the card. An interrupted run resumes from --state.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.circuits.known.high_level import PROGRAMS, Program
from interp.circuits.known.rewiring import Wires, rewired
from interp.circuits.known.words import tokenizer_of
from interp.models.names import FOLDER

HEADS, WIDTH, INNER = 4, 64, 128
#: deviation of matrices at the beginning
SCALE = 0.08
HELD_OUT = 90_001


def fresh(program: Program, seed: int) -> Any:
    """A GPT-2 of the program's layers, 4 heads, width 64, without dropout."""
    import transformers as hf

    torch.manual_seed(seed)
    config = hf.GPT2Config(
        vocab_size=len(program.words),
        n_positions=program.length,
        n_embd=WIDTH,
        n_layer=program.n_layers,
        n_head=HEADS,
        n_inner=INNER,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        initializer_range=SCALE,
        bos_token_id=0,
        eos_token_id=None,
    )
    return hf.GPT2LMHeadModel(config)


class Trainer:
    """Batches, interventions and the loss of one program."""

    def __init__(self, program: Program, module: Any, device: str):
        self.program, self.module, self.device = program, module, device
        self.wires = wires = Wires.of(program.n_layers, HEADS)
        self.outside = wires.allowed & ~wires.mask(program.edges)
        self.rows = {v: wires.senders.index(n) for v, n in program.nodes.items()}

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, device=self.device)

    def run(self, ids: np.ndarray, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, vocabulary) log-probabilities at the end, and what each sender wrote."""
        logits, wrote = rewired(self.module, self.tensor(ids), last=1, **how)
        return logits[:, -1].log_softmax(-1), wrote

    def draw(
        self, base: np.ndarray, source: np.ndarray, rng: np.random.Generator
    ) -> tuple[torch.Tensor, np.ndarray]:
        """(batch, receivers, senders) masks, and the answers that the program then gives."""
        n, allowed = len(base), self.wires.allowed.numpy()
        mask = np.zeros((n, *allowed.shape), dtype=bool)
        strict = rng.random(n) < 0.7
        share = np.where(rng.random(n) < 0.5, 1.0, rng.random(n))  # of the edges outside
        mask |= (rng.random(mask.shape) < (share * strict)[:, None, None]) & self.outside.numpy()
        swapped = {v: rng.random(n) < 0.35 for v in self.rows}
        theirs, mixed = self.program.values(source), dict[str, np.ndarray]()
        for variable, row in self.rows.items():
            mask[:, :, row] |= swapped[variable][:, None] & allowed[None, :, row]
            own = self.program.values(base, mixed)[variable]
            which = swapped[variable].reshape(-1, *[1] * (own.ndim - 1))
            mixed[variable] = np.where(which, theirs[variable], own)
        return self.tensor(mask), mixed["answer"]

    def alone(self, batch: int, rng: np.random.Generator) -> torch.Tensor:
        """The loss of the circuit by itself: along edges outside it another prompt's embeddings
        come in, and nothing else."""
        base, source = self.program.sample(batch, rng), self.program.sample(batch, rng)
        core, places = self.module.transformer, torch.arange(base.shape[1], device=self.device)
        read = core.wte(self.tensor(source)) + core.wpe(places)  # (batch, tokens, width)
        nothing = torch.zeros(len(self.wires.senders) - 1, *read.shape, device=self.device)
        found, _ = self.run(base, mask=self.outside, other=torch.cat([read[None], nothing]))
        return self.cross(found, self.program.values(base)["answer"])

    def loss(self, batch: int, rng: np.random.Generator) -> torch.Tensor:
        base, source = self.program.sample(batch, rng), self.program.sample(batch, rng)
        plain, other = self.run(source)
        mask, answer = self.draw(base, source, rng)
        changed, _ = self.run(base, mask=mask, other=other)
        return self.cross(plain, self.program.values(source)["answer"]) + self.cross(
            changed, answer
        )

    def cross(self, logp: torch.Tensor, answer: np.ndarray) -> torch.Tensor:
        return -(self.tensor(answer).to(logp) * logp).sum(-1).mean()

    @torch.no_grad()
    def measure(self, n: int, seed: int = HELD_OUT) -> dict[str, Any]:
        """Accuracy, interchange accuracy of each aligned node, the most that any other node, and
        that all edges outside together, change the probability of a token."""
        rng = np.random.default_rng(seed)
        base, source = self.program.asked(n, rng), self.program.asked(n, rng)
        plain, _ = self.run(base)
        _, other = self.run(source)
        own, theirs = self.program.values(base), self.program.values(source)
        right = own["answer"].argmax(1)
        found: dict[str, Any] = dict(n=n, accuracy=_share(plain, right), interchange={}, inert={})
        for u, name in enumerate(self.wires.senders[1:], 1):
            mask = torch.zeros_like(self.wires.allowed)
            mask[:, u] = self.wires.allowed[:, u]
            changed, _ = self.run(base, mask=mask, other=other)
            aligned = [v for v, row in self.rows.items() if row == u]
            if aligned:
                answer = self.program.values(base, {v: theirs[v] for v in aligned})["answer"]
                sure = answer.max(1) > 0.9
                found["interchange"][name] = _share(changed[sure], answer[sure].argmax(1))
            else:
                found["inert"][name] = _apart(changed, plain)
        changed, _ = self.run(base, mask=self.outside, other=other)
        found["outside"] = _apart(changed, plain)
        found["outside_flips"] = float((changed.argmax(1) != plain.argmax(1)).float().mean())
        return found


def _share(logp: torch.Tensor, right: np.ndarray) -> float:
    return float((logp.argmax(1).cpu().numpy() == right).mean())


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.exp() - b.exp()).abs().max())


def train(program: Program, arguments: argparse.Namespace) -> None:
    """Train, or resume, and write the model's folder."""
    module = fresh(program, arguments.seed).to(arguments.device).train()
    trainer = Trainer(program, module, arguments.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=arguments.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 200, max(0.02, 1.3 * (1 - s / arguments.steps)))
    )
    state, start, curve, seconds = Path(f"{arguments.state}-{program.name}.pt"), 0, [], 0.0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        module.load_state_dict(kept["module"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        start, curve, seconds = kept["step"], kept["curve"], kept["seconds"]
    begun = time.process_time()
    for step in range(start, arguments.steps):
        rng = np.random.default_rng([arguments.seed, step])
        loss = (trainer.alone if step < arguments.alone else trainer.loss)(arguments.batch, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            found = trainer.measure(512)
            took = seconds + time.process_time() - begun
            curve.append(dict(step=step + 1, loss=round(loss.item(), 5), **_short(found)))
            print(program.name, f"{took:.0f} s", json.dumps(curve[-1]), flush=True)
            torch.save(
                dict(
                    module=module.state_dict(),
                    optimizer=optimizer.state_dict(),
                    schedule=schedule.state_dict(),
                    step=step + 1,
                    curve=curve,
                    seconds=took,
                ),
                state,
            )
    seconds += time.process_time() - begun
    write(program, trainer, arguments, curve, seconds)


def _short(found: dict[str, Any]) -> dict[str, float]:
    return dict(
        accuracy=round(found["accuracy"], 4),
        interchange=round(min(found["interchange"].values()), 4),
        inert=round(max(found["inert"].values()), 5),
        outside=round(found["outside"], 5),
    )


def write(
    program: Program,
    trainer: Trainer,
    arguments: argparse.Namespace,
    curve: list[dict[str, Any]],
    seconds: float,
) -> None:
    """The model's folder: weights, tokenizer, `training.json`, and the card."""
    folder = Path(arguments.out) / program.name
    module = trainer.module.eval().cpu()
    trainer.device = "cpu"
    module.save_pretrained(folder)
    tokenizer_of(program.words).save_pretrained(folder)
    about = dict(
        seed=arguments.seed,
        steps=arguments.steps,
        alone=arguments.alone,
        batch=arguments.batch,
        learning_rate=arguments.lr,
        cpu_minutes=round(seconds / 60, 1),
        parameters=sum(p.numel() for p in module.parameters()),
        reached=trainer.measure(2048),
        torch=torch.__version__,
        curve=curve,
    )
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(program, about), encoding="utf-8")
    print(f"{program.name}: {json.dumps(about['reached'])}", flush=True)


def card(program: Program, about: dict[str, Any]) -> str:
    """The model card, with what was reached."""
    reached = about["reached"]
    rows = [
        f"| {variable} | {node} | {program.roles.get(variable, 'MLP')} | "
        f"{reached['interchange'][node]:.4f} |"
        for variable, node in program.nodes.items()
    ]
    inert = reached["inert"]
    worst = max(inert, key=inert.get)
    head = max((name for name in inert if name[0] == "L"), key=inert.get)
    return f"""# {program.name}

A `GPT2LMHeadModel` with {about["parameters"]:,} parameters ({program.n_layers} layers × {HEADS}
heads, width {WIDTH}), trained so that chosen nodes keep the variables of a program:
{program.summary}. Its circuit is known by construction, so circuit methods can be judged on it:
`interp.circuits.constructed.get("{program.name}")`. It can do nothing else, and its prompts have
{program.length} tokens.

## Program

| variable | node | role | interchange accuracy |
|---|---|---|---|
{chr(10).join(rows)}

Interchange accuracy: how often, with the node's output taken from another prompt, the answer is the
program's with that variable taken from the other prompt. Over {reached["n"]:,} held-out pairs.

## Inert nodes

Over the same pairs, the largest change of a token's probability when another prompt's values come in:
from any other head {inert[head]:.1g} ({head}), from any other MLP or head {inert[worst]:.2g}
({worst}), along all edges outside the circuit at once {reached["outside"]:.2g}, by which
{reached["outside_flips"]:.1%} of the answers change. Accuracy {reached["accuracy"]:.4f}.

## Recipe

`python examples/train_siit.py {program.name}`: strict interchange intervention training after
InterpBench (arXiv 2407.14494), with edges in place of nodes for strictness. Seed {about["seed"]},
{about["steps"]:,} steps of {about["batch"]} prompts, the first {about["alone"]:,} with the circuit
alone, AdamW {about["learning_rate"]:g}, {about["cpu_minutes"]:g} minutes of one CPU core
(torch {about["torch"]}). `training.json` has the curve.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="*", help=f"of {', '.join(PROGRAMS)}; all if none")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--alone", type=int, default=1500, help="first steps, circuit only")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--every", type=int, default=500, help="steps between measurements")
    parser.add_argument("--state", default="siit", help="where an interrupted run resumes from")
    parser.add_argument("--out", default=str(FOLDER), help="where the models' folders go")
    arguments = parser.parse_args()
    for name in arguments.programs or PROGRAMS:
        train(PROGRAMS[name], arguments)


if __name__ == "__main__":
    main()
