"""A gate between full and streaming attention for each KV head (DuoAttention)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.edits import duo_gates
from interp.edits.head_edit import HeadEdit
from interp.edits.streaming import check_sizes, open_ended, streamed
from interp.edits.values import fixed, head_values, vector
from interp.errors import EditError, HeadError
from interp_hooks.edit import BoundEdit, CallEdit, Scope
from interp_hooks.heads import Head, no_attention
from interp_kernels import attention

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model

#: tokens that a streaming head sees where gates are learned
SINK, RECENT = 128, 256


@dataclass(frozen=True)
class Gate(HeadEdit):
    """Gates each KV head between full and streaming attention: z ← α·z + (1 − α)·z_streaming.

    A KV head's α holds for all query heads that read it (DuoAttention, Xiao et al., ICLR 2025,
    arXiv 2410.10819); z_streaming sees the first `sink` and the `recent` last tokens (128 and 256
    where gates are learned, 64 and 256 where they are used).

    It acts on z, after the edits that change weights; of these z_streaming has none. Layers with a
    sliding window of their own are left as they are.

    Args:
        alpha: one α for all, KV head → α (``{"L3H0": 0.0}`` is KV head 0 of layer 3; others have
            1), a tensor (layers, kv_heads), or DuoAttention's file of one. α = 0 streams.
            Gradients flow through tensors.
        sink: first tokens of each sample that z_streaming sees; None for 128, or for what
            `config.json` says beside a file.
        recent: last tokens that it sees, the query's own included; None for 256, or as `sink`.
        scope: "all", "prefill" or "decode".

    Misleads:
        Nothing is saved: the cache keeps everything (`interp.caches.HeadCache` holds what gates of
        0 and 1 leave). The loss of running text does not see what is
        lost: with every head half open SmolLM2's falls by .005 nats, and more than half of its
        needles go.

    Raises:
        EditError: α outside [0, 1], or not as the model's KV heads are; in use, a model that sees
            later tokens, or a TransformerLens model, which shows no queries.
        HeadError: a KV head that does not exist.
        InputError, OutputError: a file that is not of gates, or can't be read.

    Example:
        >>> edit = interp.edits.Gate({"L3H0": 0.0}, sink=1, recent=1)
        >>> ids = torch.arange(8)[None]
        >>> with model.edit(edit), model.capture_z() as gated:
        ...     _ = model.logits(ids)
        >>> with model.capture_z() as own:
        ...     _ = model.logits(ids)
        >>> changed = (own[3] != gated[3]).any(-1).any(1)[0]  # two query heads read KV head 0
        >>> changed.nonzero().flatten().tolist()
        [0, 1]
    """

    alpha: Any = 1.0
    sink: int = None  # type: ignore[assignment]  # a number once it is made
    recent: int = None  # type: ignore[assignment]
    scope: Scope = "all"
    heads: tuple[Head, ...] | None = field(default=None, init=False, repr=False)

    name = "gate"

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (SINK, RECENT)
        if isinstance(self.alpha, str | os.PathLike):
            gates = duo_gates.read(self.alpha)
            object.__setattr__(self, "alpha", gates.alpha)
            sizes = (SINK if gates.sink is None else gates.sink, gates.recent or RECENT)
        for name, size in zip(("sink", "recent"), sizes, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, size)
        sink, recent = check_sizes(self.name, self.sink, self.recent)
        object.__setattr__(self, "sink", sink)
        object.__setattr__(self, "recent", recent)
        if isinstance(self.alpha, torch.Tensor) and self.alpha.ndim:
            if self.alpha.ndim != 2 or not self.alpha.is_floating_point():
                raise EditError(
                    "A tensor of gates is (layers, kv_heads) floats, not "
                    f"{tuple(self.alpha.shape)}."
                )
        else:
            object.__setattr__(self, "alpha", head_values(self.alpha, "α of gate"))
        if not all(bool(((a >= 0) & (a <= 1)).all()) for a in map(torch.as_tensor, self._given())):
            raise EditError("α of gate is between 0 (streaming) and 1 (full attention).")

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        sink: int | None = None,
        recent: int | None = None,
        scope: Scope = "all",
    ) -> Gate:
        """DuoAttention's gates from its file, as they were learned or as they are used.

        Used, a KV head has full attention or streams, and nothing between: those below the
        quantile `sparsity` of all gates stream, or those below `threshold`. Where gates are equal,
        the first heads stream (DuoAttention draws).

        Args:
            path: `full_attention_heads.tsv`, or the folder that holds it.
            sparsity: share of KV heads that stream; DuoAttention has .5 for grouped queries, .25
                without.
            threshold: the smallest gate that has full attention.
            sink, recent: as in `Gate`; DuoAttention learns with 128 and 256 and uses 64 and 256.
            scope: "all", "prefill" or "decode".

        Raises:
            EditError: both a sparsity and a threshold, or one outside [0, 1].
            InputError, OutputError: a file that is not of gates, or can't be read.

        Example:
            >>> from pathlib import Path
            >>> _ = Path("full_attention_heads.tsv").write_text("0.9\\t0.2\\n0.4\\t0.7\\n")
            >>> interp.edits.Gate.read("full_attention_heads.tsv", sparsity=0.5).alpha.tolist()
            [[1.0, 0.0], [0.0, 1.0]]
        """
        gates = duo_gates.read(path)
        alpha = duo_gates.two_valued(gates.alpha, sparsity, threshold)
        return cls(
            alpha,
            gates.sink if sink is None else sink,  # type: ignore[arg-type]
            gates.recent if recent is None else recent,  # type: ignore[arg-type]
            scope,
        )

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """DuoAttention's files in a folder, which its code, and kvpress's press, can use.

        `full_attention_heads.tsv`, a line a layer and a column a KV head, and `config.json` with
        the first and recent tokens.

        Returns:
            The folder.

        Raises:
            EditError: gates that are not given for every KV head.
            OutputError: it can't be written.

        Example:
            >>> gate = interp.edits.Gate(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), sink=4, recent=28)
            >>> again = interp.edits.Gate.read(gate.write("gates"))
            >>> again.alpha.tolist(), again.sink, again.recent
            ([[1.0, 0.0], [0.0, 1.0]], 4, 28)
        """
        if not (isinstance(self.alpha, torch.Tensor) and self.alpha.ndim == 2):
            raise EditError(
                "DuoAttention's table has a gate for every KV head; give α as (layers, KV heads)."
            )
        return duo_gates.write(folder, self.alpha, self.sink, self.recent)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Gate:
        if isinstance(fields.get("alpha"), str):
            raise EditError(
                "An edit file holds the gates themselves; make it with Gate.read(FILE) and "
                "interp.edits.save."
            )
        return cls(**fields)

    def _given(self) -> list[Any]:
        return list(self.alpha.values()) if isinstance(self.alpha, dict) else [self.alpha]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The tensors among α that a gradient is asked for."""
        return [a for a in self._given() if isinstance(a, torch.Tensor) and a.requires_grad]

    def is_identity(self) -> bool:
        if isinstance(self.alpha, torch.Tensor) and self.alpha.ndim:
            return not self.alpha.requires_grad and bool((self.alpha == 1).all())
        return all(fixed(a, 1) for a in self._given())

    def bind(self, model: Model) -> CallEdit:
        self.check_model(model)
        return BoundGate(self, model.backend)

    def check_model(self, model: Model) -> None:
        if isinstance(self.alpha, torch.Tensor) and self.alpha.ndim:
            expected = model.n_layers, model.n_kv_heads
            if tuple(self.alpha.shape) != expected:
                raise EditError(
                    f"The gates are {tuple(self.alpha.shape)}; {model.name} has {expected} KV "
                    "heads."
                )
            self._check_absent(self.alpha, model)
        if isinstance(self.alpha, Mapping):
            sizes = {(s.tower, s.layer): s.n_kv_heads for s in model.sites if s.kind == "self"}
            for head in self.alpha:
                towers = (head.tower,) if head.tower else ("", "text")
                if head.head >= max(sizes.get((tower, head.layer), 0) for tower in towers):
                    here = {layer: n for (tower, layer), n in sizes.items() if tower in towers}
                    raise HeadError(
                        f"{model.name} has no KV head {head}: "
                        + (
                            f"layer {head.layer} has {here[head.layer]} KV heads."
                            if head.layer in here
                            else f"{no_attention(head.layer, here)}."
                        )
                    )

    def _check_absent(self, alpha: torch.Tensor, model: Model) -> None:
        """Raise `HeadError` for a gate other than 1 on a KV head that is not there."""
        absent = torch.ones(alpha.shape, dtype=torch.bool)
        for site in model.sites:
            if site.is_main:
                absent[site.layer, : site.n_kv_heads] = False
        wrong = (absent & (alpha.detach().cpu() != 1)).nonzero().tolist()
        if wrong:
            layers = {s.layer: s.n_kv_heads for s in model.sites if s.is_main}
            layer, head = wrong[0]
            raise HeadError(
                f"{model.name} has no KV head {Head(layer, head)}, whose gate is to be 1: "
                + (
                    f"layer {layer} has {layers[layer]} KV heads."
                    if layer in layers
                    else f"{no_attention(layer, layers)}."
                )
            )

    def at(self, site: Site) -> bool:
        if not isinstance(self.alpha, Mapping):
            return super().at(site)
        towers = ("", site.tower) if site.tower == "text" else (site.tower,)
        return site.kind == "self" and any(
            h.layer == site.layer and h.tower in towers for h in self.alpha
        )

    def touches(self, call: AttentionCall) -> bool:
        return super().touches(call) and open_ended(call)

    def gates(self, site: Site, device: torch.device) -> torch.Tensor:
        """(query heads,): α of the KV head that each reads."""
        if isinstance(self.alpha, torch.Tensor) and self.alpha.ndim:
            alpha = self.alpha[site.layer].to(device)
        elif isinstance(self.alpha, Mapping):
            by_head = {h.head: a for h, a in self.alpha.items() if h.layer == site.layer}
            alpha = vector([by_head.get(h, 1.0) for h in range(site.n_kv_heads)], device)
        else:
            alpha = vector([self.alpha] * site.n_kv_heads, device)
        return alpha.repeat_interleave(site.n_heads // site.n_kv_heads)

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        return self.blended(call, z, "auto")

    def blended(self, call: AttentionCall, z: torch.Tensor, backend: str) -> torch.Tensor:
        """z (batch, queries, heads, d) of `attend`, with streaming attention by `backend`."""
        if call.query is None or call.key is None:
            raise EditError(
                "gate needs queries and keys, and TransformerLens shows the weights; "
                "load the HuggingFace "
                "model."
            )
        gates = self.gates(call.site, z.device)
        if not gates.requires_grad and bool((gates == 1).all()):
            return z
        other = streamed(call, self.sink, self.recent, self.name)
        streaming = attention(
            call.query,
            call.key,
            call.value,
            **other.settings,
            backend=backend,
        ).out.transpose(1, 2)
        weight = gates.to(z.dtype)[:, None]  # (heads, 1)
        if not gates.requires_grad and bool(((gates == 0) | (gates == 1)).all()):
            return torch.where(weight == 1, z, streaming)
        return weight * z + (1 - weight) * streaming

    def route(self, site: Site) -> str:
        return (
            f"gate: full attention and streaming ({self.sink} first, {self.recent} recent), "
            "blended by KV head"
        )


class BoundGate(BoundEdit[Gate]):
    """A gate in one model, whose backend runs the streaming attention."""

    def __init__(self, edit: Gate, backend: str):
        super().__init__(edit)
        self.backend = backend

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        return self.edit.blended(call, z, self.backend)
