"""Writing attention heads into the weights of a GPT-2: codes, matches, copies, distractors (see
`planted`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from interp_hooks.heads import Head

LAYERS, HEADS, D_HEAD = 4, 8, 64
WIDTH = HEADS * D_HEAD
#: each coordinate of the ballast; codes have coordinates of about 1
BALLAST = 50.0
#: logit of the right answer where the circuit's output is a token's whole code
ANSWER = 15.0
#: logit of a decoy's match
DECOY = 20.0
#: blocks that hold no code
EMPTY = ("ballast", "junk")


def basis_of(size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size − 1): random orthonormal columns, each of mean zero."""
    draw = np.column_stack([np.ones(size), rng.standard_normal((size, size - 1))])
    return np.linalg.qr(draw)[0][:, 1:]


def random_codes(n: int, size: int, rng: np.random.Generator, steps: int = 0) -> np.ndarray:
    """(n, size) mean-zero codes of norm √size; `steps` of gradient descent on Σ (c_i·c_j)⁴ push
    them apart."""
    codes = rng.standard_normal((n, size))
    for step in range(steps + 1):
        codes -= codes.mean(1, keepdims=True)
        codes /= np.linalg.norm(codes, axis=1, keepdims=True)
        if step < steps:
            overlap = codes @ codes.T
            np.fill_diagonal(overlap, 0)
            codes -= overlap**3 @ codes
    return codes * math.sqrt(size)


@dataclass(frozen=True)
class Places:
    """Codes of `n` positions: cosines and sines of `frequencies` (radians a token) in a block of
    len(basis)."""

    n: int
    frequencies: np.ndarray
    basis: np.ndarray  # (size, 2 · frequencies), orthonormal, mean zero

    @staticmethod
    def make(n: int, size: int, rng: np.random.Generator) -> Places:
        """Orthogonal but for 1 / (size − 2) where n < size, else nearly so: max |cosine| about
        0.4."""
        waves = size // 2 - 1
        frequencies = 2 * np.pi * np.arange(1, waves + 1) / (2 * waves + 1)  # of period size − 1
        if n > 2 * waves + 1:
            frequencies = np.pi * (np.arange(waves) + rng.random(waves)) / waves
        return Places(n, frequencies, basis_of(size, rng)[:, : 2 * waves])

    @property
    def codes(self) -> np.ndarray:
        """(n, size), each of norm √size."""
        angle = np.arange(self.n)[:, None] * self.frequencies
        raw = np.concatenate([np.cos(angle), np.sin(angle)], 1) * math.sqrt(
            len(self.basis) / len(self.frequencies)
        )
        return raw @ self.basis.T

    def one_back(self) -> np.ndarray:
        """(2 · frequencies, 2 · frequencies): a code's coordinates c ↦ c @ this, those of the
        position before."""
        cos, sin = np.diag(np.cos(self.frequencies)), np.diag(np.sin(self.frequencies))
        return np.block([[cos, -sin], [sin, cos]])


def share_of(code: np.ndarray) -> np.ndarray:
    """(size, 1): c ↦ how much of `code` is in c, 1 for the code itself."""
    return code[:, None] / (code @ code)


def unit(basis: np.ndarray) -> np.ndarray:
    """(size, d): c ↦ its coordinates in `basis`, of norm 1 for a code."""
    return basis / math.sqrt(len(basis))


class Weights:
    """The weights of all heads, zero until written: q, k, v = x W + b, and then out.

    Args:
        sizes: block → width, in order; "position" and "ballast" are among them, and "junk" takes
            what is left.
    """

    def __init__(self, sizes: dict[str, int], places: Places):
        self.places = places
        self.block: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            self.block[name] = slice(start, start + size)
            start += size
        self.block["junk"] = slice(start, WIDTH)
        self.qkv = np.zeros((LAYERS, HEADS, 3, WIDTH, D_HEAD))
        self.bias = np.zeros((LAYERS, HEADS, D_HEAD))  # of queries
        self.out = np.zeros((LAYERS, HEADS, D_HEAD, WIDTH))
        self._used: dict[tuple[Head, str], int] = {}

    def _take(self, head: Head, what: str, n: int) -> slice:
        """The next `n` free dimensions of the head's queries and keys ("qk") or values ("v")."""
        start = self._used.get((head, what), 0)
        if start + n > D_HEAD:
            raise ValueError(f"{head} needs {start + n} dimensions for {what} and has {D_HEAD}.")
        self._used[head, what] = start + n
        return slice(start, start + n)

    def match(
        self,
        head: Head,
        query: str,
        key: str,
        logit: float,
        k_map: np.ndarray,
        q_map: np.ndarray | None = None,
    ) -> None:
        """Add logit · (q · k), where q = q_map of the query's block and k = k_map of the key's,
        (block, d) both."""
        at, dims = (head.layer, head.head), self._take(head, "qk", k_map.shape[1])
        gain = math.sqrt(abs(logit) * math.sqrt(D_HEAD))  # shared by queries and keys
        self.qkv[at][0, self.block[query], dims] = gain * (k_map if q_map is None else q_map)
        self.qkv[at][1, self.block[key], dims] = math.copysign(gain, logit) * k_map

    def sink(self, head: Head, logit: float) -> None:
        """Add `logit` to position 0, for every query."""
        at, dims = (head.layer, head.head), self._take(head, "qk", 1)
        gain = math.sqrt(logit * math.sqrt(D_HEAD))
        self.bias[at][dims] = gain
        self.qkv[at][1, self.block["position"], dims] = gain * share_of(self.places.codes[0])

    def copy(self, head: Head, reads: str, writes: str, basis: np.ndarray, gain: float) -> None:
        """z: the coordinates of the block `reads` in `basis`; `gain` times what they stand for goes
        to `writes`."""
        at, dims = (head.layer, head.head), self._take(head, "v", basis.shape[1])
        self.qkv[at][2, self.block[reads], dims] = basis
        self.out[at][dims, self.block[writes]] = gain * basis.T

    def decoys(self, free: Sequence[Head], reads: str, rng: np.random.Generator) -> str:
        """Make a previous-token head and a sink of two of the `free` heads, writing into junk; a
        sentence about it."""
        previous, sink = (next(h for h in free if h.layer == layer) for layer in (1, 2))
        whole = unit(self.places.basis)
        self.match(previous, "position", "position", DECOY, whole, whole @ self.places.one_back())
        self.sink(sink, DECOY)
        block = self.block[reads]
        for head in (previous, sink):
            basis = basis_of(block.stop - block.start, rng)
            self.qkv[head.layer, head.head][2, block, : basis.shape[1]] = basis
            self._into_junk(head, math.sqrt(basis.shape[1]), rng)
        return (
            f"{previous} (previous token) and {sink} (sink) look like heads of a circuit and do "
            "nothing."
        )

    def distract(
        self, heads: Sequence[Head], like: Sequence[Head], rng: np.random.Generator
    ) -> None:
        """Random heads: W_Q, W_K, W_V, W_O have the mean Frobenius norms of the heads `like`."""
        rows = np.concatenate(
            [np.arange(WIDTH)[b] for name, b in self.block.items() if name not in EMPTY]
        )
        qkv = np.mean([np.linalg.norm(self.qkv[h.layer, h.head], axis=(1, 2)) for h in like], 0)
        out = float(np.mean([np.linalg.norm(self.out[h.layer, h.head]) for h in like]))
        for head in heads:
            for part in range(3):
                draw = rng.standard_normal((len(rows), D_HEAD))
                self.qkv[head.layer, head.head][part, rows] = (
                    draw * qkv[part] / np.linalg.norm(draw)
                )
            self._into_junk(head, out, rng)

    def _into_junk(self, head: Head, norm: float, rng: np.random.Generator) -> None:
        """A random W_O of this Frobenius norm that writes into the block junk, mean zero."""
        junk = self.block["junk"]
        draw = rng.standard_normal((D_HEAD, junk.stop - junk.start))
        draw -= draw.mean(1, keepdims=True)
        self.out[head.layer, head.head][:, junk] = draw * norm / np.linalg.norm(draw)


@torch.no_grad()
def build(weights: Weights, tokens: Mapping[str, np.ndarray], logits: np.ndarray) -> Any:
    """A GPT-2. `tokens`: block → (vocabulary, block), the embedding; `logits`: (vocabulary, block
    "out"), read by the unembedding."""
    import transformers as hf

    block, places = weights.block, weights.places
    config = hf.GPT2Config(
        vocab_size=len(logits),
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=places.n,
        n_inner=8,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(
        devices=[]
    ):  # the draw is overwritten; the caller's generator stays as it was
        model = hf.GPT2LMHeadModel(config).eval()
    size = block["ballast"].stop - block["ballast"].start
    divisor = BALLAST * math.sqrt(size / WIDTH)  # LayerNorm's, nearly
    for name, parameter in model.named_parameters():
        parameter.fill_(divisor if ".ln_" in name and name.endswith("weight") else 0.0)
    for name, codes in tokens.items():
        model.transformer.wte.weight[:, block[name]] = torch.tensor(codes, dtype=torch.float32)
    position = model.transformer.wpe.weight
    position[:, block["position"]] = torch.tensor(places.codes, dtype=torch.float32)
    position[:, block["ballast"]] = BALLAST * torch.tensor([1.0, -1.0]).repeat(size // 2)
    model.lm_head.weight[:, block["out"]] = torch.tensor(logits, dtype=torch.float32)
    for layer, module in enumerate(model.transformer.h):
        qkv = (
            weights.qkv[layer].transpose(2, 1, 0, 3).reshape(WIDTH, 3 * WIDTH)
        )  # (in, [q | k | v] head by head)
        module.attn.c_attn.weight.copy_(torch.tensor(qkv))
        module.attn.c_attn.bias[:WIDTH] = torch.tensor(
            weights.bias[layer].reshape(-1), dtype=torch.float32
        )
        module.attn.c_proj.weight.copy_(torch.tensor(weights.out[layer].reshape(WIDTH, WIDTH)))
    return model
