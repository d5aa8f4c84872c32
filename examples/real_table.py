"""What the toolkit says on a model that nobody here trained: SmolLM2-135M-Instruct.

    python examples/real_table.py --out examples/real_table.json --page docs/results.md

Four parts, each cell written to the JSON as soon as it is there, so that an interrupted run goes
on: (a) the strongest heads ablated, against screened random draws; (b) edits on real
classification data, needles and loss; (c) sinks, retrieval and induction by length; (d) the same
ids through HuggingFace, HookedTransformer and TransformerBridge. `--data` is a folder of
`{"text", "label"}` files (sst2_dev.jsonl, cr.jsonl), needed by (b); two runs with different
--parts may share a file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

import interp
from interp.evaluation.ablation import controls
from interp.evaluation.accuracy import by_steps
from interp.evaluation.loss import continuation_loss
from interp.inputs.batches import left_padded
from interp.inputs.forward import forward
from interp.inputs.text import rows_of_text
from interp.probes.probe import ProbeBatch
from interp.support.statistics import bootstrap, mcnemar
from interp.tasks.answers import judge
from interp.tasks.floor import at_floor
from interp.tasks.induction import Induction
from interp.tasks.labelled import Labelled
from interp.tasks.niah import NeedleInAHaystack
from interp.tasks.task import Instance, Task
from interp_hooks.edit import Edit
from interp_hooks.heads import Head
from interp_hooks.logits import logits_of

TOP, DRAWS = 8, 20
KINDS = ("retrieval", "induction", "sink")
#: a head at or above it is no control: it belongs to the kind itself
SCREEN = dict(retrieval=0.1, induction=0.1, sink=0.3)
FORMAT = "lead"  # what `interp.tasks.pose` finds for this model; recorded in part a
LENGTHS = (512, 1024, 2048, 4096, 8192)


class Book:
    """Cells by name in a JSON file; each is measured once."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path = path
        with self._open() as content:
            content.setdefault("about", about)
            content.setdefault("cells", {})

    @contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        with filelock.FileLock(f"{self.path}.lock"):
            content = json.loads(self.path.read_text()) if self.path.is_file() else {}
            yield content
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            os.replace(new, self.path)

    def cell(self, name: str, measure: Callable[[], Any]) -> Any:
        """The cell of that name, measured now if it is not there."""
        with self._open() as content:
            if name in content["cells"]:
                return content["cells"][name]
        started = time.time()
        value = measure()
        with self._open() as content:
            content["cells"][name] = value
            content["about"].setdefault("seconds", {})[name] = round(time.time() - started, 1)
        print(f"{time.strftime('%H:%M:%S')} {name}: {json.dumps(value)[:150]}", flush=True)
        return value


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % bootstrap interval and number of values."""
    return {
        k: round(v, 4) if isinstance(v, float) else v for k, v in vars(bootstrap(values)).items()
    }


def losses(model: Any, rows: list[list[int]], first: int) -> list[float]:
    """Mean next-token loss of each row from the token at `first` on, in nats."""
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), 4):
            ids, mask, _ = left_padded(rows[start : start + 4], 0)
            logits = logits_of(forward(model, ids, mask)).float()[:, first - 1 : -1]
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, first:], reduction="none"
            )
            found += each.mean(-1).tolist()
    return found


# (a) ------------------------------------------------------------------------------------------


def ablations(model: Any, book: Book) -> None:
    """The strongest heads of each kind taken out, and 20 screened draws from the same layers."""
    formats = lambda: interp.tasks.pose(model, interp.tasks.get("niah")).note  # noqa: E731
    book.cell("a/format", formats)
    scores = book.cell("a/scores", lambda: scores_of(model))
    needles = NeedleInAHaystack(lengths=(256,), format=FORMAT).sample(model.tokenizer, 16, 1)
    again = Induction(50).sample(model.tokenizer, 12, 1)
    repeat = [[*i.ids] for i in again]
    second = again[0].info["start"] + again[0].info["repeat"] + 1
    prose = rows_of_text(model.tokenizer, None, 256, 8, 1)

    def measured(heads: Sequence[Head]) -> dict[str, Any]:
        edits = [interp.edits.Ablate(list(heads))] if heads else []
        task = NeedleInAHaystack(format=FORMAT)
        with model.edit(*edits):
            return dict(
                needles=interval([c for c, _ in judge(model, task, needles)]),
                repeat=interval(losses(model, repeat, second)),
                prose=interval(losses(model, prose, 1)),
            )

    book.cell("a/untouched", lambda: measured([]))
    for kind in KINDS:
        ranked = sorted(scores[kind], key=lambda h: -scores[kind][h])
        top = [Head.parse(h) for h in ranked[:TOP]]
        barred = [Head.parse(h) for h in ranked if scores[kind][h] >= SCREEN[kind]]
        book.cell(f"a/{kind}/top", lambda top=top: dict(heads=list(map(str, top)), **measured(top)))
        for draw in range(DRAWS):
            heads = controls(model, top, barred, np.random.default_rng([7, draw]))
            book.cell(
                f"a/{kind}/draw {draw}",
                lambda heads=heads: dict(heads=list(map(str, heads)), **measured(heads)),
            )
    # the strongest sinks copy, where there is something to copy; so those that never do, too
    idle = [
        Head.parse(h)
        for h in sorted(scores["sink"], key=lambda h: -scores["sink"][h])
        if all(scores[kind][h] < SCREEN[kind] for kind in ("retrieval", "induction"))
    ][:TOP]
    book.cell("a/idle/top", lambda: dict(heads=list(map(str, idle)), **measured(idle)))


def scores_of(model: Any) -> dict[str, dict[str, float]]:
    """score → head → value, at 512 tokens (needles of 128 to 512)."""
    atlas = interp.scan_heads(
        model, list(KINDS), context=512, samples=16, format=FORMAT, progress=False
    )
    print(*atlas.notes, sep="\n", flush=True)
    table = atlas.frame
    names = [f"L{layer}H{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]
    return {
        kind: {n: round(float(v), 4) for n, v in zip(names, table[kind], strict=True)}
        for kind in KINDS
    }


# (b) ------------------------------------------------------------------------------------------


def edits_of(book: Book) -> dict[str, Callable[[Instance | None], Edit]]:
    """What the table calls it → the edit for an instance; published settings, nothing tuned."""
    e = interp.edits
    scores = book.cell("a/scores", dict)["retrieval"]
    heads = sorted(scores, key=lambda h: -scores[h])[:TOP]

    def pasta(instance: Instance | None) -> Edit:
        # ln α on the keys outside the span is −ln α on those inside, once rows are renormalised
        info = {} if instance is None else instance.info
        span = info.get("text") or info.get("question") or (0, 1)
        return e.ScaleTokens(span, gain=100.0, heads=heads, scope="prefill")

    made: dict[str, Edit] = {
        "ZeroTuning γ = 0.5": e.ZeroTuning(0.5),
        "ZeroTuning γ = 2": e.ZeroTuning(2.0),
        "ZeroTuning γ = 4": e.ZeroTuning(4.0),
        "ACT, all heads": e.ACT(),
        "Temperature τ = 0.8": e.Temperature(0.8),
        "Temperature τ = 1.25": e.Temperature(1.25),
        "Streaming, 4 + 512": e.Streaming(4, 512),
        "Gate α = 0.5, 64 + 256": e.Gate(0.5, 64, 256),
    }
    table: dict[str, Callable[[Instance | None], Edit]] = {
        name: (lambda instance, edit=edit: edit) for name, edit in made.items()
    }
    return {**table, f"PASTA α = 0.01, {TOP} retrieval heads": pasta}


def columns_of(data: Path, n: int) -> dict[str, tuple[Task, int, int]]:
    """column → (task, problems, seed); the emphasised span is the review, or the question."""
    columns: dict[str, tuple[Task, int, int]] = {}
    for shots in (0, 4):
        for label, file in (("SST-2", "sst2_dev.jsonl"), ("CR", "cr.jsonl")):
            columns[f"{label}, {shots} shots"] = Labelled(str(data / file), shots), n, 1
    for context, count in ((1024, 24), (4096, 8), (8192, 4)):
        task = NeedleInAHaystack(lengths=(context,), format=FORMAT)
        columns[f"needles, {context:,} tokens"] = task, count, 1
    return columns


def answers(
    model: Any, task: Task, problems: Sequence[Instance], edit: Callable[[Instance | None], Edit]
) -> list[float]:
    """Right or wrong under the edit; an edit that depends on the problem is made for each."""
    own = edit(None) != edit(problems[0])
    if own:
        runs = [judge(model, task, [p], [edit(p)], by_steps([edit(p)])) for p in problems]
        return [correct for run in runs for correct, _ in run]
    one = edit(None)
    return [c for c, _ in judge(model, task, problems, [one], by_steps([one]))]


def changed(plain: Sequence[float], found: Sequence[float]) -> dict[str, Any]:
    """The value under an edit, and the paired difference."""
    test = mcnemar(plain, found)
    return dict(
        value=interval(found),
        difference=interval([b - a for a, b in zip(plain, found, strict=True)]),
        p=None if test is None else round(test.p, 4),
    )


def curing(model: Any, book: Book, data: Path, n: int, only: str = "") -> None:
    """Every edit on every column, paired; and what two calibrations give and cost."""
    table = edits_of(book)
    rows = rows_of_text(model.tokenizer, None, 512, 12, 1)
    columns = columns_of(data, n)
    for column, (task, count, seed) in columns.items():
        if not column.startswith(only):
            continue
        problems = task.sample(model.tokenizer, count, seed)
        plain = book.cell(
            f"b/{column}/untouched", lambda t=task, p=problems: [c for c, _ in judge(model, t, p)]
        )
        book.cell(f"b/{column}/level", lambda p=plain: interval(p))
        if at_floor(sum(plain), len(plain), task.chance):
            continue  # an edit of a model that can't do it shows nothing
        for name, edit in table.items():
            book.cell(
                f"b/{column}/{name}",
                lambda t=task, p=problems, e=edit, u=plain: changed(u, answers(model, t, p, e)),
            )
    if only not in ("", "loss"):
        return
    for name, edit in table.items():
        if not name.startswith("PASTA"):  # it needs a span, and running text has none
            book.cell(f"b/loss/{name}", lambda e=edit(None): loss_cell(model, rows, e))
    for method, settings in (
        ("zerotuning", dict(grid=[0.25, 0.5, 1.0, 2.0, 4.0])),
        ("act", dict(guard="none")),
    ):
        for column in ("SST-2, 0 shots",):
            task = columns[column][0]
            book.cell(
                f"b/calibrated/{method}/{column}",
                lambda m=method, s=settings, t=task: calibrated(model, m, t, s),
            )


def loss_cell(model: Any, rows: list[list[int]], *edits: Edit) -> dict[str, Any]:
    """Loss of the second half of each row given the first."""
    found = continuation_loss(model, rows, list(edits), steps=False)
    assert found.edited is not None and found.difference is not None
    levels = dict(baseline=found.baseline, value=found.edited, difference=found.difference)
    return {k: {a: round(b, 4) for a, b in vars(v).items()} for k, v in levels.items()}


def calibrated(model: Any, method: str, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings chosen on 32 training texts, measured on 368 others, and elsewhere."""
    found = interp.calibrate(model, method, task, n=32, heldout=368, seed=3, **settings)
    held = found.heldout.accuracy
    return dict(
        edits=[edit.to_json() for edit in found.edits],
        train=vars(found.train.accuracy.difference),
        baseline=vars(held.baseline),
        heldout=vars(held.difference),
        **{name: asdict(change) for name, change in found.elsewhere.items()},
    )


# (c) ------------------------------------------------------------------------------------------


def lengths(model: Any, book: Book) -> None:
    """Sinks, retrieval and induction at growing context."""
    for context in LENGTHS:
        samples = max(4, min(8, 8192 // context))

        def scanned(context: int = context, samples: int = samples) -> dict[str, Any]:
            atlas = interp.scan_heads(
                model, "sink", context=context, samples=samples, progress=False
            )
            sink = atlas.frame["sink"]
            return dict(heads=int((sink >= 0.3).sum()), mean=round(float(sink.mean()), 4))

        book.cell(f"c/sink/{context}", scanned)
        book.cell(f"c/induction/{context}", lambda c=context: induction_at(model, c))
        book.cell(f"c/retrieval/{context}", lambda c=context, s=samples: retrieval_at(model, c, s))


def kept(steps: dict[int, list[Any]], stats: Any) -> None:
    """Put one layer's statistics of a step with the others of that layer."""
    steps.setdefault(stats.site.layer, []).append(stats)


def retrieval_at(model: Any, context: int, samples: int) -> dict[str, Any]:
    """Needles solved at exactly this length, and the strongest heads by copying."""
    from interp.probes.needle import NeedleProbe
    from interp.scores.retrieval import copied

    task = NeedleInAHaystack(lengths=(context,), format=FORMAT)
    probe, totals, solved = NeedleProbe(), {}, 0
    for problem in task.sample(model.tokenizer, samples, 2):
        steps: dict[int, list[Any]] = {}
        batch = ProbeBatch(torch.tensor([problem.prompt]), None, dict(instance=problem, task=task))
        score = interp.scores.get("retrieval")
        probe.run(model, batch, score.ask(batch), partial(kept, steps))
        solved += bool(batch.info["solved"])
        for layer, by_step in steps.items() if batch.info["solved"] else ():
            share = copied(by_step, batch).float().mean(-1)
            for head, value in enumerate(share.tolist()):
                name = f"L{layer}H{head}"
                totals[name] = totals.get(name, 0.0) + value
    means = {name: round(total / max(1, solved), 3) for name, total in totals.items()}
    best = sorted(means, key=lambda h: -means[h])[:5]
    above = sum(v >= 0.1 for v in means.values())
    return dict(solved=solved, of=samples, above=above, top={h: means[h] for h in best})


def induction_at(model: Any, context: int) -> dict[str, Any]:
    """Induction scores on random tokens repeated after half of the context."""
    task = Induction(context // 2 - 1)
    (problem,) = task.sample(model.tokenizer, 1, 2)
    batch = ProbeBatch(torch.tensor([problem.ids]), None, dict(problem.info))
    score, found = interp.scores.get("induction"), {}

    def note(stats: Any) -> None:
        for head, value in enumerate(score.measure(stats, batch)[0].tolist()):
            found[f"L{stats.site.layer}H{head}"] = round(value, 3)

    with torch.no_grad(), model.watch(score.ask(batch), note):
        forward(model, batch.input_ids, keep=1)
    best = sorted(found, key=lambda h: -found[h])[:5]
    above = sum(v >= 0.4 for v in found.values())
    return dict(above=above, top={h: found[h] for h in best})


# (d) ------------------------------------------------------------------------------------------


def agreement(name: str, book: Book) -> None:
    """The same ids through three libraries, in float32: the largest difference of any head."""
    scores = ["sink", "entropy", "max_prob", "distance", "waad", "value_drain"]
    plain = interp.load(name, dtype="float32")
    inputs = rows_of_text(plain.tokenizer, None, 256, 4, 5)

    def scan(model: Any) -> Any:
        return interp.scan_heads(model, scores, inputs=inputs, progress=False).frame

    def all_three() -> dict[str, dict[str, float]]:
        from interp_hooks.hooking import hook

        mine, found = scan(plain), {}
        for label, other in others(plain):
            theirs = scan(hook(other, name=label, tokenizer=plain.tokenizer))
            found[label] = {s: float((mine[s] - theirs[s]).abs().max()) for s in scores}
        return found

    book.cell("d/largest difference", all_three)


def others(plain: Any) -> Iterator[tuple[str, Any]]:
    """The same weights as a HookedTransformer and as a TransformerBridge."""
    from tempfile import TemporaryDirectory

    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    c = plain.module.config
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_heads=c.num_attention_heads,
        d_head=plain.d_head,
        n_ctx=512,
        d_vocab=c.vocab_size,
        d_mlp=c.intermediate_size,
        n_key_value_heads=c.num_key_value_heads,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=plain.d_head,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        device="cpu",
    )
    hooked = HookedTransformer(config)
    as_they_are = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    state = convert_llama_weights(plain.module, config)
    hooked.load_and_process_state_dict(state, **dict.fromkeys(as_they_are, False))
    yield "HookedTransformer", hooked.eval()
    with TemporaryDirectory() as folder:
        plain.module.save_pretrained(folder)
        plain.tokenizer.save_pretrained(folder)
        yield (
            "TransformerBridge",
            TransformerBridge.boot_transformers(
                folder, hf_model=plain.module, tokenizer=plain.tokenizer, device="cpu"
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("examples/real_table.json"))
    parser.add_argument("--data", type=Path, help="folder of sst2_dev.jsonl and cr.jsonl")
    parser.add_argument("--parts", default="abcd")
    parser.add_argument(
        "--columns",
        default="",
        help="of (b): only names that begin so; or loss, with the calibrations",
    )
    parser.add_argument("--n", type=int, default=400, help="texts a classification")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, help="put the tables between this page's markers")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    about = dict(
        model=given.model,
        dtype="bfloat16 (a-c), float32 (d)",
        date=time.strftime("%Y-%m-%d"),
        hardware=f"{os.cpu_count()} CPU cores, {given.threads} threads, {platform.machine()}",
        versions={p: version(p) for p in ("torch", "transformers", "transformer-lens")},
    )
    book = Book(given.out, about)
    if set(given.parts) & set("abc"):
        model = interp.load(given.model, dtype="bfloat16")
        if "a" in given.parts:
            ablations(model, book)
        if "b" in given.parts:
            curing(model, book, given.data, given.n, given.columns)
        if "c" in given.parts:
            lengths(model, book)
    if "d" in given.parts:
        agreement(given.model, book)
    if given.page:
        from real_page import write

        write(given.out, given.page)


if __name__ == "__main__":
    main()
