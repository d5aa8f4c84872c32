"""Nodes and edges of a model as graph files of EAP-IG and MIB name them, and as this toolkit
does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError

if TYPE_CHECKING:
    from interp.circuits.circuit import Circuit

_NODE = re.compile(r"(input|logits|m(?P<mlp>\d+)|a(?P<layer>\d+)\.h(?P<head>\d+))")
_EDGE = re.compile(r"(?P<sender>[^<>-]+)->(?P<receiver>[^<>-]+?)(<(?P<kind>[qkv])>)?")


@dataclass(frozen=True)
class GraphShape:
    """Layers × heads, which query heads share keys (`groups`, heads of each key-value head; none
    where each has its own), whether blocks are parallel, and the width of the stream."""

    layers: int
    heads: int
    groups: int | None
    parallel: bool
    d_model: int

    @classmethod
    def of(cls, circuit: Circuit, d_model: int | None, parallel: bool | None) -> GraphShape:
        frame = circuit.frame
        sizes = frame.groupby("layer")["head"].nunique()
        layers, heads = int(frame["layer"].max()) + 1, int(sizes.iloc[0])
        if len(sizes) != layers or not bool((sizes == heads).all()):
            raise InputError(
                f"A graph file holds models of one attention of one size in every layer, and "
                f"{circuit.model} has layers without, or of other numbers of heads."
            )
        shared = frame.groupby("layer")["kv_head"].nunique()
        if not bool((shared == shared.iloc[0]).all()):
            raise InputError(
                f"Layers of {circuit.model} share keys in groups of different sizes, which a graph "
                "file does not hold."
            )
        count = int(shared.iloc[0])
        width = d_model or circuit.provenance.get("d_model")
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise InputError(
                "This circuit's record has no d_model, which a graph file needs; give d_model=."
            )
        groups = None if count == heads else heads // count
        beside = circuit.provenance.get("parallel") if parallel is None else parallel
        if not isinstance(beside, bool):
            raise InputError(
                "This circuit's record does not say whether MLPs read beside the attention, which "
                "a graph file needs; give parallel=True or False."
            )
        return cls(layers, heads, groups, beside, width)

    @classmethod
    def read(cls, source: Path, config: Mapping[str, Any], kv_heads: int | None) -> GraphShape:
        names = ("n_layers", "n_heads", "d_model")
        layers, heads, width = (_size(config.get(n, 1 if n == "d_model" else None)) for n in names)
        if not layers or not heads or not width:
            raise InputError(f"{source} has no cfg with whole numbers n_layers and n_heads.")
        groups = None
        if kv_heads is not None:
            if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads < 1 \
                    or heads % kv_heads:  # fmt: skip
                raise InputError(
                    f"kv_heads divides the {heads} heads of a layer in {source}; {kv_heads!r} does "
                    "not."
                )
            groups = None if kv_heads == heads else heads // kv_heads
        return cls(layers, heads, groups, bool(config.get("parallel_attn_mlp", False)), width)

    def config(self) -> dict[str, Any]:
        """`cfg` of the file."""
        return dict(
            n_layers=self.layers,
            n_heads=self.heads,
            parallel_attn_mlp=self.parallel,
            d_model=self.d_model,
        )

    def writers(self) -> Iterator[str]:
        """Heads and MLPs in the order in which they write."""
        for layer in range(self.layers):
            yield from (f"a{layer}.h{h}" for h in range(self.heads))
            yield f"m{layer}"

    def edges(self) -> Iterator[str]:
        """All edges that there are."""
        before = ["input"]
        for layer in range(self.layers):
            heads = [f"a{layer}.h{h}" for h in range(self.heads)]
            for u in before:
                yield from (f"{u}->{head}<{kind}>" for head in heads for kind in "qkv")
            reads = before if self.parallel else [*before, *heads]
            yield from (f"{u}->m{layer}" for u in reads)
            before = [*before, *heads, f"m{layer}"]
        yield from (f"{u}->logits" for u in before)

    def theirs(self, sender: str, receiver: str, kind: str) -> list[str]:
        """An edge of ours, as theirs: one for each query head of a shared key-value head."""
        u = _their_node(sender)
        if "KV" not in receiver:
            v = _their_node(receiver)
            return [f"{u}->{v}<{kind}>" if kind else f"{u}->{v}"]
        layer, number = (int(n) for n in receiver[1:].split("KV"))
        size = self.groups or 1
        return [f"{u}->a{layer}.h{h}<{kind}>" for h in range(number * size, (number + 1) * size)]

    def ours(self, name: str) -> tuple[str, str, str]:
        """(sender, receiver, kind) of an edge of theirs."""
        found = _EDGE.fullmatch(name)
        assert found is not None
        u, v, kind = _our_node(found["sender"]), _our_node(found["receiver"]), found["kind"] or ""
        if kind in ("k", "v") and self.groups is not None:
            layer, head = v[1:].split("H")
            v = f"L{layer}KV{int(head) // self.groups}"
        return u, v, kind


def _size(value: Any) -> int:
    """A whole number above 0; 0 for anything else."""
    right = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if right else 0


def _their_node(name: str) -> str:
    if name in ("input", "output"):
        return {"input": "input", "output": "logits"}[name]
    if name.startswith("MLP "):
        return f"m{name[4:]}"
    layer, _, head = name[1:].partition("H")
    return f"a{layer}.h{head}"


def _our_node(name: str) -> str:
    found = _NODE.fullmatch(name)
    assert found is not None
    if name in ("input", "logits"):
        return {"input": "input", "logits": "output"}[name]
    if found["mlp"] is not None:
        return f"MLP {found['mlp']}"
    return f"L{found['layer']}H{found['head']}"
