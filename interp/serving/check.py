"""A user's own model and edits inside vLLM, held against the same edits in transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from interp.edits.head_edit import HeadEdit
from interp.errors import InputError, MissingExtraError
from interp.loading import load, resolve
from interp.serving.settle import settled
from interp.support.provenance import versions

#: tokens generated from each prompt
TOKENS = 12
#: the most that log-probabilities and statistics may differ by, by the dtype of the weights
CLOSE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 2e-1}
#: of what an edit must move to be told from none
MOVED = 10
PROMPTS = (
    "Mary and John went to the store, and",
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is",
    "A list of things that grow in a garden in summer: tomatoes, beans, sunflowers, strawberries,",
)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Comparison:
    """One number of the engine held against transformers'.

    Attributes:
        what: what was compared.
        differs: by how much at most.
        bound: how much it may.
        equal: whether it is within.

    Example:
        >>> Comparison("entropy under the edits", 3e-5, 1e-3, True).equal
        True
    """

    what: str
    differs: float
    bound: float
    equal: bool


@dataclass(frozen=True)
class ServeCheck:
    """What a check found.

    Attributes:
        model: its name.
        comparisons: one after the other.
        moves: how far the edits move log-probabilities in the engine.
        versions: of the packages at work.

    Example:
        >>> ServeCheck("tiny", [Comparison("entropy", 3e-5, 1e-3, True)], 0.4).equal
        True
    """

    model: str
    comparisons: list[Comparison]
    moves: float
    versions: dict[str, Any] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether everything is."""
        return all(one.equal for one in self.comparisons)


@dataclass
class _Reading:
    """A prompt's continuation: tokens, the log-probability of each, statistics (rows, layers,
    heads) of each."""

    tokens: list[int]
    logprobs: list[float]
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)


def check(
    model: str,
    edits: Sequence[HeadEdit] | HeadEdit,
    *,
    prompts: Sequence[str] = PROMPTS,
    tokens: int = TOKENS,
    dtype: str = "float32",
    progress: Progress | None = None,
    **engine: Any,
) -> ServeCheck:
    """Whether vLLM, with `interp_vllm` in it, gives what transformers gives under edits.

    Greedy tokens and their log-probabilities, under the edits and without, in one batch and again
    with a filled prefix cache; entropy and first-token mass of every head; and that the edits move
    something.

    Args:
        model: a name, hub id or folder of a checkpoint that both read.
        edits: in order.
        prompts: texts.
        tokens: generated from each.
        dtype: of the weights.
        progress: called with (done, total, what).
        engine: more settings of `vllm.LLM`, like ``tensor_parallel_size=2``.

    Returns:
        every comparison.

    Raises:
        MissingExtraError: vLLM is not installed.
        InputError: a model that is a GGUF file, or a dtype that is none.
        ServingError: an edit, or an engine, that is not served.

    Example:
        >>> interp.serving.check("llama", interp.edits.Ablate(["L2H3"])).equal  # doctest: +SKIP
        True
    """
    if find_spec("vllm") is None:
        raise MissingExtraError(
            "Checks of serving need vLLM, which asks for an older transformers than interp does; "
            "docs/how-to/serve-an-edit.md has the commands that install both."
        )
    if dtype not in CLOSE:
        raise InputError(f"The dtype of a check is one of {', '.join(CLOSE)}, not {dtype!r}.")
    found = resolve(model)
    if found.gguf:
        raise InputError(f"{found.name} is a GGUF file; serve-check reads checkpoints of folders.")
    tell = progress or (lambda done, total, what: None)
    tell(0, 3, "transformers")
    hooked = load(model, device="cpu", dtype=dtype)
    ready = settled(hooked, edits)
    rows = [hooked.tokenizer(text)["input_ids"] for text in prompts]
    plain, edited = (
        [_by_transformers(hooked, row, given, tokens) for row in rows] for given in ([], ready)
    )
    del hooked
    tell(1, 3, "vLLM")
    served = _by_vllm(found.target, rows, ready, tokens, dtype, engine)
    tell(3, 3, "")
    return compared(found.name, plain, edited, served, CLOSE[dtype])


@torch.no_grad()
def _by_transformers(
    model: Any, row: list[int], edits: Sequence[HeadEdit], tokens: int
) -> _Reading:
    from transformers import DynamicCache

    ids, cache, reading = torch.tensor([row], device=model.device), DynamicCache(), _Reading([], [])
    first = torch.zeros(1, len(row) + tokens, dtype=torch.int64) - 1
    first[0, 0] = 0  # the only token of the only group
    with (
        model.edit(*edits),
        model.observe("entropy", "group_mass", labels=first, stage="before") as seen,
    ):
        for _ in range(tokens):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            row_of = out.logits[0, -1].float().log_softmax(-1)
            token = int(row_of.argmax())
            reading.tokens.append(token)
            reading.logprobs.append(float(row_of[token]))
            ids = torch.tensor([[token]], device=model.device)
    layers = [site.layer for site in model.sites]

    def by_row(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(values).permute(2, 0, 1)[-tokens:].float().cpu()  # (rows, layers, heads)

    reading.statistics = {
        "entropy": by_row([seen[layer].entropy[0] for layer in layers]),
        "first": by_row([seen[layer].group_mass[0, ..., 0] for layer in layers]),
    }
    return reading


def _by_vllm(
    target: str,
    rows: Sequence[list[int]],
    edits: Sequence[HeadEdit],
    tokens: int,
    dtype: str,
    engine: dict[str, Any],
) -> list[list[_Reading]]:
    """[under the edits, without, both again from the prefix cache], a reading a prompt."""
    from vllm import LLM, SamplingParams

    from interp_vllm import asking, statistics

    length = max(map(len, rows)) + tokens + 1
    settings: dict[str, Any] = {"max_model_len": length, "max_num_seqs": 8}
    settings |= {"kv_cache_memory_bytes": 1 << 30, "additional_config": {"interp": True}} | engine
    llm = LLM(target, dtype=dtype, **settings)
    wanted = ["entropy", "first"]
    kinds = [asking(edits, wanted), asking([], wanted)]
    found = []
    for _ in range(2):
        params = [
            SamplingParams(
                max_tokens=tokens, temperature=0, logprobs=1, ignore_eos=True, extra_args=extra
            )
            for extra in kinds
            for _ in rows
        ]
        prompts = [{"prompt_token_ids": row} for _ in kinds for row in rows]
        readings = []
        for output in llm.generate(prompts, params, use_tqdm=False):
            said = output.outputs[0]
            pairs = zip(said.logprobs, said.token_ids, strict=True)
            kept = statistics(llm, output.request_id)
            readings.append(
                _Reading(
                    list(said.token_ids),
                    [float(each[token].logprob) for each, token in pairs],
                    {name: kept.values[name] for name in wanted},
                )
            )
        found += [readings[: len(rows)], readings[len(rows) :]]
    return found


def compared(
    name: str,
    plain: Sequence[_Reading],
    edited: Sequence[_Reading],
    served: Sequence[Sequence[_Reading]],
    bound: float,
) -> ServeCheck:
    """The comparisons of readings by transformers, without edits and under them, with the engine's
    in the order of `_by_vllm`."""
    found = []
    labels = ("under the edits", "without", "under the edits, again", "without, again")
    for label, readings, wanted in zip(labels, served, (edited, plain) * 2, strict=True):
        other = sum(a.tokens != b.tokens for a, b in zip(readings, wanted, strict=True))
        found.append(Comparison(f"greedy tokens {label}", float(other), 0.0, not other))
        # what follows another token is another text
        same = [(a, b) for a, b in zip(readings, wanted, strict=True) if a.tokens == b.tokens]
        far = [abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs, strict=True)]
        found.append(_held(f"log-probabilities {label}", max(far, default=0.0), bound))
        for stat in ("entropy", "first"):
            gaps = [float((a.statistics[stat] - b.statistics[stat]).abs().max()) for a, b in same]
            found.append(_held(f"{stat} {label}", max(gaps, default=0.0), 10 * bound))
    moves = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(*served[:2], strict=True)]
    least = MOVED * bound
    moved = max(moves, default=0.0)
    found.append(Comparison("the edits move log-probabilities", moved, least, moved > least))
    return ServeCheck(name, found, moved, versions())


def _held(what: str, differs: float, bound: float) -> Comparison:
    return Comparison(what, differs, bound, differs <= bound)
