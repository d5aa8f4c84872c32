"""Writing programs into a GPT-2: features of the residual stream, heads that match and move them,
neurons that combine them, and heads beside them that do nothing.

The stream is a sum of named blocks of features, each feature a direction. A head of a program
matches some blocks at the query with some at the key, and moves blocks of what it finds to others.
A few coordinates hold the same large numbers at every position, the ballast; they are nearly all of
the stream's norm, so LayerNorm multiplies by the same number everywhere, its gain takes that number
out, and a program runs as it is written: to eight digits, since the model is in float64.

Edges follow from the blocks: u → v is one where v reads what u writes.

Heads outside the program are drawn at random with the sizes of those inside, or are *twins*: they
look where a head of the program looks, and move what it moves elsewhere. They write to the block
"junk", which only they read, and to "aside", which the program's queries read as well, but only
against the same key everywhere: that adds one number to all scores of a query, and a softmax
doesn't see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from interp.circuits.known.ends import Edge, End
from interp.circuits.known.rewiring import rewired
from interp_hooks.heads import Head

#: coordinates of the ballast, and their size; codes have norms of about 1
COORDINATES, BALLAST = 16, 2.0**18
#: blocks of the input that are the same in every prompt
CONSTANT = ("one", "place", "bos")
#: features of the block that only heads outside the program read, and an MLP's other neurons
JUNK, NEURONS = 48, 16

Maps = Mapping[str, np.ndarray]
Frame = Callable[[int, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Size:
    """Layers, heads a layer, dimensions a head, and tokens of a prompt."""

    layers: int
    heads: int
    d_head: int
    length: int


class Wiring:
    """A program's weights in terms of features.

    Args:
        size: of the model.
        blocks: name → features, beside "one", "place" (a feature a position), "bos" and "token" (a
            feature a word of the vocabulary), which the input writes.
        vocabulary: how many words.
        rng: draws which heads of a layer are the program's, and the others.
        junk: features that only heads outside the program write and read.
    """

    def __init__(
        self,
        size: Size,
        blocks: Mapping[str, int],
        vocabulary: int,
        rng: np.random.Generator,
        junk: int = JUNK,
    ):
        self.size, self.vocabulary, self.rng = size, vocabulary, rng
        sizes = dict(one=1, place=size.length, bos=1, token=vocabulary, **blocks)
        sizes |= dict(aside=2, junk=junk)
        self.block, self.n = {}, 0
        for name, width in sizes.items():
            self.block[name] = slice(self.n, self.n + width)
            self.n += width
        #: features of the program: all but what heads outside it write
        self.live = np.arange(self.block["aside"].start)
        shape = (size.layers, size.heads)
        self.qkv = np.zeros((*shape, 3, self.n, size.d_head))
        self.out = np.zeros((*shape, size.d_head, self.n))
        self._neurons: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self._unembed = np.zeros((self.n, vocabulary))
        self._free = {la: rng.permutation(size.heads).tolist() for la in range(size.layers)}
        self._used: dict[tuple[Head, str], int] = {}
        #: who reads and writes which blocks
        self.reads: dict[tuple[End, str], set[str]] = {}
        self.writes: dict[End, set[str]] = {"input": {*CONSTANT, "token"}}
        self.roles: dict[Head, str] = {}

    # --- the program
    # ------------------------------------------------------------------------------------------

    def head(self, layer: int, role: str) -> Head:
        """A head of this layer for the program, its number drawn; it attends uniformly until it
        matches something."""
        found = Head(layer, int(self._free[layer].pop()))
        self.roles[found] = role
        return found

    def _take(self, head: Head, what: str, n: int) -> slice:
        start = self._used.get((head, what), 0)
        if start + n > self.size.d_head:
            raise ValueError(f"{head} needs {start + n} dimensions for {what}.")
        self._used[head, what] = start + n
        return slice(start, start + n)

    def match(self, head: Head, query: Maps, key: Maps, score: float) -> None:
        """Adds `score` · (Σ query blocks @ their maps) · (Σ key blocks @ theirs) to the head's
        scores; maps are (block, r)."""
        at = (head.layer, head.head)
        dims = self._take(head, "qk", next(iter(query.values())).shape[1])
        gain = math.sqrt(abs(score) * math.sqrt(self.size.d_head))
        for part, (kind, maps) in enumerate(dict(q=query, k=key).items()):
            scale = math.copysign(gain, score) if part else gain
            for name, mapped in maps.items():
                self.qkv[at][part, self.block[name], dims] = scale * mapped
                self.reads.setdefault((head, kind), set()).add(name)

    def move(
        self, head: Head, reads: str, writes: str, mapped: np.ndarray, share: float = 1.0
    ) -> None:
        """What the head finds in the block `reads`, @ `mapped` · `share`, goes to `writes`."""
        at, dims = (head.layer, head.head), self._take(head, "v", min(mapped.shape))
        u, s, v = np.linalg.svd(mapped, full_matrices=False)
        root = np.sqrt(s * abs(share))
        self.qkv[at][2, self.block[reads], dims] = u * root
        self.out[at][dims, self.block[writes]] += math.copysign(1, share) * root[:, None] * v
        self.reads.setdefault((head, "v"), set()).add(reads)
        self.writes.setdefault(head, set()).add(writes)

    def neurons(self, layer: int, reads: Maps, bias: np.ndarray, writes: Maps) -> None:
        """Neurons of the layer's MLP: relu(Σ blocks @ reads + bias) @ writes; maps are (block, n)
        and (n, block)."""
        w_in, w_out = np.zeros((self.n, len(bias))), np.zeros((len(bias), self.n))
        name = f"MLP {layer}"
        for block, mapped in reads.items():
            w_in[self.block[block]] = mapped
            self.reads.setdefault((name, ""), set()).add(block)
        for block, mapped in writes.items():
            w_out[:, self.block[block]] = mapped
            self.writes.setdefault(name, set()).add(block)
        self._neurons.setdefault(layer, []).append((w_in, bias, w_out))

    def answer(self, block: str, mapped: np.ndarray, words: Sequence[int]) -> None:
        """Logits of these `words`: the block @ `mapped` (block, words)."""
        self._unembed[self.block[block], words] += mapped
        self.reads.setdefault(("output", ""), set()).add(block)

    def edges(self) -> tuple[tuple[Edge, ...], tuple[Edge, ...]]:
        """Edges along which what differs between prompts flows, and those that carry constants."""
        varying: list[Edge] = []
        constant: list[Edge] = []
        for (receiver, part), read in self.reads.items():
            for sender, written in self.writes.items():
                if not (read & written) or _stage(sender) >= _stage(receiver):
                    continue
                same = sender == "input" and read & written <= set(CONSTANT)
                (constant if same else varying).append((sender, receiver, part))
        return tuple(varying), tuple(constant)

    # --- everything else
    # ------------------------------------------------------------------------------------------

    @property
    def others(self) -> list[Head]:
        """The heads outside the program."""
        size = self.size
        every = [Head(la, h) for la in range(size.layers) for h in range(size.heads)]
        return [h for h in every if h not in self.roles]

    def distract(self) -> None:
        """Fills the heads outside the program and the MLPs' other neurons, after the program is
        written."""
        rng, inside = self.rng, list(self.roles)
        reads = np.concatenate([self.live, np.arange(self.n)[self.block["junk"]]])
        size = [
            np.mean([np.linalg.norm(self.qkv[h.layer, h.head, part]) for h in inside])
            for part in range(3)
        ]
        out = float(np.mean([np.linalg.norm(self.out[h.layer, h.head]) for h in inside]))
        for head in inside:  # a query reads "aside" against the same key everywhere
            dims = self._take(head, "qk", 1)
            self.qkv[head.layer, head.head, 0, self.block["aside"], dims] = rng.normal(size=(2, 1))
            self.qkv[head.layer, head.head, 1, self.block["one"], dims] = 2.0
        for head in self.others:
            at = (head.layer, head.head)
            models = [h for h in inside if h.layer == head.layer]
            if models and rng.random() < 0.4:
                twin = models[int(rng.integers(len(models)))]
                self.qkv[at] = self.qkv[twin.layer, twin.head]
            else:
                for part in range(3):
                    draw = rng.standard_normal((len(reads), self.size.d_head))
                    self.qkv[at][part, reads] = draw * size[part] / np.linalg.norm(draw)
            self._elsewhere(head, out)
        for layer in range(self.size.layers):
            w_in, w_out = np.zeros((self.n, NEURONS)), np.zeros((NEURONS, self.n))
            w_in[reads] = rng.standard_normal((len(reads), NEURONS)) / math.sqrt(len(reads))
            junk = self.block["junk"]
            w_out[:, junk] = rng.standard_normal((NEURONS, junk.stop - junk.start)) / NEURONS
            self._neurons.setdefault(layer, []).append((w_in, np.zeros(NEURONS), w_out))

    def _elsewhere(self, head: Head, norm: float) -> None:
        """A random W_O of this Frobenius norm into "junk" and "aside"."""
        where = np.r_[self.block["aside"], self.block["junk"]]
        draw = self.rng.standard_normal((self.size.d_head, len(where)))
        self.out[head.layer, head.head][:, where] = draw * norm / np.linalg.norm(draw)

    @torch.no_grad()
    def level(self, module: Any, ids: torch.Tensor) -> None:
        """Makes the heads outside write as strongly, on these prompts, as the program's on
        average: scales their W_O in `module`."""
        wrote = rewired(module, ids)[1][1:].norm(dim=-1).mean((1, 2))  # all but the input
        heads = wrote.unflatten(0, (self.size.layers, self.size.heads + 1))[:, :-1]
        norms = heads.double().numpy()
        target = np.mean([norms[h.layer, h.head] for h in self.roles])
        for head in self.others:
            W_O = module.transformer.h[head.layer].attn.c_proj.weight
            rows = W_O.unflatten(0, (self.size.heads, -1))[head.head]
            rows *= target / norms[head.layer, head.head]

    @torch.no_grad()
    def build(self, frame: Frame | None = None) -> Any:
        """The GPT-2. `frame`: (features, width, rng) → how features are written (width, features)
        and read (width, features); by default a coordinate each."""
        import transformers as hf

        size, width = self.size, self.size.heads * self.size.d_head
        write, read = (frame or coordinates)(self.n, width - COORDINATES, self.rng)
        write, read = (np.pad(side, ((0, COORDINATES), (0, 0))) for side in (write, read))
        inner = max(sum(len(b) for _, b, _ in rows) for rows in self._neurons.values())
        config = hf.GPT2Config(
            vocab_size=self.vocabulary,
            n_embd=width,
            n_layer=size.layers,
            n_head=size.heads,
            n_positions=size.length,
            n_inner=inner,
            activation_function="relu",
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it was
            model = hf.GPT2LMHeadModel(config).double().eval()
        for name, parameter in model.named_parameters():
            gain = ".ln_" in name and name.endswith("weight")
            parameter.fill_(BALLAST * math.sqrt(COORDINATES / width) if gain else 0.0)
        core = model.transformer
        tokens = np.zeros((self.vocabulary, self.n))
        tokens[:, self.block["token"]] = np.eye(self.vocabulary)
        tokens[0, self.block["bos"]] = 1
        places = np.zeros((size.length, self.n))
        places[:, self.block["place"]] = np.eye(size.length)
        places[:, self.block["one"]] = 1
        _fill(core.wte.weight, tokens @ write.T)
        _fill(core.wpe.weight, places @ write.T)
        core.wpe.weight[:, -COORDINATES:] = BALLAST * torch.tensor([1.0, -1.0]).repeat(
            COORDINATES // 2
        )
        _fill(model.lm_head.weight, self._unembed.T @ read.T)
        for layer, block in enumerate(core.h):
            qkv = np.tensordot(read, self.qkv[layer], (1, 2)).transpose(0, 2, 1, 3)
            _fill(block.attn.c_attn.weight, qkv.reshape(width, 3 * width))
            _fill(block.attn.c_proj.weight, self.out[layer].reshape(width, self.n) @ write.T)
            start = 0
            for w_in, bias, w_out in self._neurons.get(layer, []):
                rows = slice(start, start + len(bias))
                start = rows.stop
                _fill(block.mlp.c_fc.weight[:, rows], read @ w_in)
                _fill(block.mlp.c_fc.bias[rows], bias)
                _fill(block.mlp.c_proj.weight[rows], w_out @ write.T)
        return model


def coordinates(n: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A coordinate a feature; the last coordinate takes the negative sum of what is written, so
    that the norm has no mean to subtract."""
    if n >= width:
        raise ValueError(f"{n} features need more than {width} dimensions.")
    read = np.eye(width)[:, :n]
    write = read.copy()
    write[-1] = -1
    return write, read


def superposed(n: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """More features than dimensions: unit directions of mean zero, pushed apart, written and read
    alike, so that every feature reads a little of all others."""
    codes = rng.standard_normal((n, width))
    for step in range(400):
        codes -= codes.mean(1, keepdims=True)
        codes /= np.linalg.norm(codes, axis=1, keepdims=True)
        if step < 399:
            overlap = codes @ codes.T
            np.fill_diagonal(overlap, 0)
            codes -= 10 * overlap**3 @ codes
    return codes.T, codes.T


def _fill(parameter: torch.Tensor, values: np.ndarray) -> None:
    parameter.copy_(torch.as_tensor(values, dtype=parameter.dtype))


def _stage(end: End) -> tuple[float, int]:
    """When it writes, or reads: attention before the MLP of its layer."""
    if isinstance(end, Head):
        return end.layer, 0
    if end in ("input", "output"):
        return (-1, 0) if end == "input" else (math.inf, 0)
    return int(end.removeprefix("MLP ")), 1
