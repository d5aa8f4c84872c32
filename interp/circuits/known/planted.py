"""Models with a circuit written into their weights by hand: the truth is exact, so methods can be
judged on it.

Both models are GPT-2s of 4 layers × 8 heads (width 512, d_head 64, MLPs that add nothing, an
unembedding of its own). The residual stream is split into blocks. Tokens, positions and classes
have mean-zero codes of fixed norm in blocks of their own, and each head of the circuit reads some
blocks and writes one. Two blocks hold no code:

* *ballast*: the same large vector at every position. It makes up nearly all of the stream's norm,
  so LayerNorm
  multiplies by nearly the same number everywhere; its gain takes that number out again, and
  LayerNorm is the identity to within one percent, whatever the heads write.
* *junk*: where the heads outside the circuit write. No query, key, value or logit reads it.

Heads outside the circuit have random queries, keys and values of the circuit heads' size, read
every block that holds codes, and so attend and answer to the text like any head. They can act on
the rest through this one percent alone. One of them looks like a previous-token head and one like a
sink.

Logits of matches are chosen so that attention is sharp but not saturated where heads compose:
gradients see the edges. A sink is a key at position 0, whose token, BOS, has no code.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from interp.circuits.known.planted_weights import (
    ANSWER,
    HEADS,
    LAYERS,
    Places,
    Weights,
    basis_of,
    build,
    random_codes,
    share_of,
    unit,
)
from interp.circuits.known.truth import Edge, Truth
from interp.errors import InputError, UnknownNameError
from interp.inputs import lexicon
from interp.inputs.text import check_seed
from interp.inputs.tokenizer import Text
from interp.tasks.ioi import IndirectObject
from interp.tasks.task import Instance, Task
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

__all__ = ["Planted", "RepeatedPair", "get", "names"]


@dataclass(frozen=True)
class Planted:
    """A model with a known circuit, and the task that the circuit does."""

    model: HookedModel
    task: Task
    truth: Truth
    name: str
    summary: str


@dataclass(frozen=True)
class RepeatedPair(Task):
    """BOS and different random tokens … A B … A → B, `length` tokens in all; one position is
    judged, the last.

    `wrong`: four other tokens of the context. Corrupted: the first A is a token that occurs nowhere
    else, so nothing is determined. `info["first"]` is the index of the first A.
    """

    length: int = 28

    name = "repeated_pair"
    summary = "what followed the last token when it occurred before"
    citation = "Olsson et al. 2022, arXiv 2209.11895"

    def __post_init__(self) -> None:
        if self.length < 10:
            raise InputError(f"The task {self.name} needs 10 tokens or more, not {self.length}.")

    def instance(self, text: Text, rng: np.random.Generator) -> Instance:
        bos, vocabulary = text.bos, text.vocabulary()
        n = self.length - len(bos) - 1  # tokens before the second A
        if len(vocabulary) <= n:
            raise InputError(
                f"The task {self.name} needs more than {n} different tokens; this tokenizer has "
                "fewer."
            )
        *context, other = rng.choice(vocabulary, n + 1, replace=False).tolist()
        i = int(rng.integers(n - 2))
        rest = [t for k, t in enumerate(context) if k not in (i, i + 1)]
        wrong = tuple(int(t) for t in rng.choice(rest, 4, replace=False))
        corrupted = [*context[:i], other, *context[i + 1 :]]
        return Instance(
            ids=(*bos, *context, context[i]),
            positions=(self.length - 1,),
            accept=((context[i + 1],),),
            wrong=(wrong,),
            corrupted=(*bos, *corrupted, context[i]),
            info=dict(first=len(bos) + i),
        )


@dataclass(frozen=True)
class _Draft:
    """A circuit's weights before the other heads are drawn: the embedding's codes by block, what
    the unembedding reads, the heads by class, the edges."""

    weights: Weights
    tokens: dict[str, np.ndarray]
    logits: np.ndarray
    roles: dict[str, list[Head]]
    edges: list[Edge]
    task: Task
    summary: str


def _layout(stages: dict[str, Sequence[int]], rng: np.random.Generator) -> dict[str, list[Head]]:
    """class → heads in the layers asked for, none twice, head numbers drawn."""
    free = {layer: rng.permutation(HEADS).tolist() for layer in range(LAYERS)}
    return {
        name: [Head(layer, int(free[layer].pop())) for layer in layers]
        for name, layers in stages.items()
    }


def _induction(text: Text, rng: np.random.Generator) -> _Draft:
    """A previous-token head writes into each position what came before; the induction head's keys
    read that, its queries the current token, and it copies the token where the two match
    (K-composition), or finds its sink."""
    vocabulary = len(text.tokenizer)
    places = Places.make(128, 64, rng)
    weights = Weights(dict(position=64, token=64, previous=64, out=64, ballast=32), places)
    token, basis = random_codes(vocabulary, 64, rng), basis_of(64, rng)
    token[text.bos] = 0  # what a head finds at its sink is nothing
    roles = _layout({"previous token": [0], "induction": [2]}, rng)
    (previous,), (induction,) = roles.values()

    here = unit(places.basis)
    weights.match(previous, "position", "position", 20.0, here, here @ places.one_back())
    weights.copy(previous, "token", "previous", basis, 1.0)

    weights.match(induction, "token", "previous", 14.0, unit(basis))
    weights.sink(induction, 10.5)
    weights.copy(induction, "token", "out", basis, 1.0)
    summary = "a previous-token head and an induction head (K-composition)"
    edges: list[Edge] = [(previous, induction, "k")]
    return _Draft(
        weights, {"token": token}, token * ANSWER / 64, roles, edges, RepeatedPair(), summary
    )


def _ioi(text: Text, rng: np.random.Generator) -> _Draft:
    """Three stages, after Wang et al. 2022 (arXiv 2211.00593):

    * duplicate token: a name looks for the same name, not at its own position, so S2 finds S1; it
      writes the name and
      its kind, "a name", into the blocks `duplicate` and `flag`. Where there is no duplicate, it
      finds its sink.
    * S-inhibition: " to" looks for the flag, finds S2, and copies the name in `duplicate` there
      into `inhibited`.
    * name mover: " to" looks for names, less for the inhibited one, and copies what it finds to the
      logits.

    The heads of a stage share its work unequally, so that their effects differ.
    """
    vocabulary = len(text.tokenizer)
    places = Places.make(31, 32, rng)
    sizes = dict(
        position=32,
        name=32,
        kind=8,
        token=32,
        duplicate=32,
        flag=8,
        inhibited=32,
        out=32,
        ballast=16,
    )
    weights = Weights(sizes, places)
    people = [text.one(w) for w in text.pool(lexicon.NAMES, 6, "names")]
    codes, basis, kinds = (
        random_codes(len(people), 32, rng, steps=300),
        basis_of(32, rng),
        basis_of(8, rng),
    )
    is_name, is_to, is_other = kinds.T[:3] * math.sqrt(8)
    name, kind = np.zeros((vocabulary, 32)), np.tile(is_other, (vocabulary, 1))
    name[people], kind[people], kind[text.one("to")] = codes, is_name, is_to
    token, out = random_codes(vocabulary, 32, rng), random_codes(vocabulary, 32, rng)
    out[people] = codes
    kind[text.bos] = token[text.bos] = 0
    roles = _layout(
        {"duplicate token": [0, 0], "S-inhibition": [1, 2], "name mover": [3, 3, 3]}, rng
    )
    duplicates, inhibitors, movers = roles.values()

    for head, share in zip(duplicates, (0.6, 0.4), strict=True):
        weights.match(head, "name", "name", 16.0, unit(basis))
        weights.match(head, "position", "position", -32.0, unit(places.basis))  # not itself
        weights.sink(head, 10.5)
        weights.copy(head, "name", "duplicate", basis, share)
        weights.copy(head, "kind", "flag", kinds, share)
    for head, share in zip(inhibitors, (0.55, 0.45), strict=True):
        weights.match(head, "kind", "flag", 13.0, share_of(is_name), share_of(is_to))
        weights.sink(head, 6.5)
        weights.copy(head, "duplicate", "inhibited", basis, share)
    for head, share in zip(movers, (0.45, 0.35, 0.2), strict=True):
        weights.match(head, "kind", "kind", 16.0, share_of(is_name), share_of(is_to))
        weights.match(head, "inhibited", "name", -5.0, unit(basis))
        weights.sink(head, 8.0)
        weights.copy(head, "name", "out", basis, share)

    edges: list[Edge] = [
        (d, i, part) for d in duplicates for i in inhibitors for part in ("k", "v")
    ]
    edges += [(i, m, "q") for i in inhibitors for m in movers]
    tokens = {"name": name, "kind": kind, "token": token}
    summary = "duplicate-token, S-inhibition and name-mover heads"
    return _Draft(weights, tokens, out * ANSWER / 32, roles, edges, IndirectObject(), summary)


_MAKERS = {"induction": _induction, "ioi": _ioi}


def names() -> list[str]:
    """Names of the planted circuits.

    Example:
        >>> interp.circuits.planted.names()
        ['induction', 'ioi']
    """
    return list(_MAKERS)


def get(name: str, seed: int = 0) -> Planted:
    """The planted model called `name`: a model whose circuit is known, and its task.

    Args:
        name: of `names()`.
        seed: draws codes, the heads' places in their layers, and all other heads.

    Raises:
        UnknownNameError: there is none.
        InputError: a negative seed.

    Example:
        >>> found = interp.circuits.planted.get(interp.circuits.planted.names()[0])
        >>> len(found.truth.heads) > 0
        True
    """
    check_seed(seed)
    if name not in _MAKERS:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names())}."
        raise UnknownNameError(f"There is no planted circuit called {name!r}; {hint}")
    import transformers as hf

    from interp.models.names import FOLDER
    from interp_hooks.hooking import hook

    tokenizer = hf.AutoTokenizer.from_pretrained(FOLDER / "pocket_llama")
    rng = np.random.default_rng([seed, names().index(name)])
    draft = _MAKERS[name](Text(tokenizer), rng)
    heads = {h: role for role, members in draft.roles.items() for h in members}
    every = [Head(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    note = draft.weights.decoys([h for h in every if h not in heads], "token", rng)
    draft.weights.distract(
        [h for h in every if not draft.weights.out[h.layer, h.head].any()], list(heads), rng
    )
    module = build(draft.weights, draft.tokens, draft.logits)
    model = hook(
        module,
        name=f"planted-{name}",
        tokenizer=tokenizer,
        note=f"a circuit written by hand, seed {seed}",
    )
    truth = Truth(
        name,
        heads,
        LAYERS,
        HEADS,
        f"planted, seed {seed}",
        model.name,
        edges=tuple(draft.edges),
        notes=(note,),
    )
    return Planted(model, draft.task, truth, name, draft.summary)
