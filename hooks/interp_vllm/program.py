"""What a request's edits do in this rank, made once when the request comes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from interp_hooks.call import Site
from interp_hooks.edit import Edit
from interp_hooks.heads import Head
from interp_kernels.paged import RowChange
from interp_vllm.errors import ServingError
from interp_vllm.reading import reader
from interp_vllm.served import ServedModel
from interp_vllm.settings import Asked, Settings

#: edits that an engine serves
EDITS = ("ablate", "scale_heads", "scale_tokens", "shift_heads", "temperature", "zero_tuning")
#: fields that are heads, or head → value
BY_HEAD = ("heads", "gains", "gamma", "tau", "directions")


@dataclass(frozen=True)
class Where:
    """Which tokens an edit acts on: a scope, and a range of positions."""

    scope: str = "all"
    start: int = 0
    stop: int | None = None

    def holds(self, position: int, generated: bool) -> bool:
        """Whether it acts on the query at a position of the prompt, or of what is generated."""
        right = self.scope == "all" or (self.scope == "decode") == generated
        return right and self.start <= position and (self.stop is None or position < self.stop)


@dataclass(frozen=True)
class Change:
    """z_h ← γ_h z_h + b_h in every layer: gain (layers, heads), offset (layers, heads, d) or None,
    both float32."""

    gain: torch.Tensor
    offset: torch.Tensor | None = None

    def then(self, after: Change) -> Change:
        """This, and then `after`: γ₂(γ₁z + b₁) + b₂."""
        offset = after.offset
        if self.offset is not None:
            moved = after.gain[..., None] * self.offset
            offset = moved if offset is None else moved + offset
        return Change(after.gain * self.gain, offset)

    @property
    def layers(self) -> frozenset[int]:
        """The rows of `gain` that change anything."""
        there = (self.gain != 1).any(-1)
        if self.offset is not None:
            there = there | (self.offset != 0).flatten(1).any(-1)
        return frozenset(there.nonzero().flatten().tolist())


@dataclass
class Program:
    """A request's edits, and what it asks.

    Attributes:
        changes: gains and offsets after the attention, in order, with their tokens.
        inside: edits of the attention itself, in order, with their tokens.
        asked: statistics wanted; None for none.
        rows: layer → edits that act → what they do to a row's logits, once it is known.
    """

    changes: list[tuple[Where, Change]] = field(default_factory=list)
    inside: list[tuple[Where, Edit]] = field(default_factory=list)
    asked: Asked | None = None
    rows: dict[int, dict[tuple[int, ...], RowChange]] = field(default_factory=dict)

    @property
    def edges(self) -> list[int]:
        """Positions where what acts changes."""
        wheres = [where for where, _ in (*self.changes, *self.inside)]
        ends = itertools.chain.from_iterable((w.start, w.stop) for w in wheres)
        return sorted({edge for edge in ends if edge})

    def change(self, position: int, generated: bool) -> Change | None:
        """The changes of z that act there, as one; None for none."""
        whole: Change | None = None
        for where, change in self.changes:
            if where.holds(position, generated):
                whole = change if whole is None else whole.then(change)
        return whole

    def edits(self, site: Site, position: int, generated: bool) -> list[Any]:
        """The edits of the attention that act there, in order."""
        found = [e for where, e in self.inside if where.holds(position, generated)]
        return [edit for edit in found if edit.at(site)]


def checked(settings: Settings, model: ServedModel) -> Settings:
    """The settings with every field of their edits said, once they are known to be served.

    Raises:
        ServingError: an edit that engines do not serve, or not so.
        EditError, HeadError, UnknownNameError: as the edit itself.
    """
    entries = []
    for entry in settings.edits:
        edit = reader().edit_of(entry)
        name = str(entry["edit"])
        _check_served(name, edit)
        for head in getattr(edit, "concerned", None) or ():
            model.check(head)
        entries.append(reader().fields_of(edit))
        _check_width(entries[-1], model)
    return Settings(tuple(entries), settings.asked)


def _check_served(name: str, edit: Any) -> None:
    if name not in EDITS:
        raise ServingError(
            f"{name} is not served inside an engine; {', '.join(EDITS)} are. Others act on a model "
            "of transformers (model.edit)."
        )
    if name == "ablate" and edit.mode not in ("zero", "uniform"):
        instead = (
            "its mean is of a reference that the engine has not read; "
            "interp.serving.settled(model, edits) gives the same edit with the mean in it"
            if edit.mode == "mean"
            else "zero, uniform and mean are"
        )
        raise ServingError(f"ablate by {edit.mode} is not served inside an engine: {instead}.")
    keys = getattr(edit, "keys", None)
    if isinstance(keys, torch.Tensor) or (isinstance(keys, str) and keys == "image"):
        raise ServingError(
            f"The keys of {name} are positions of this request's tokens, or a text of it, inside "
            "an engine; not image tokens, nor a tensor over samples."
        )


def _check_width(entry: Mapping[str, Any], model: ServedModel) -> None:
    for head, vector in (entry.get("directions") or {}).items():
        if len(vector) != model.d_head:
            raise ServingError(
                f"The vector of {head} has {len(vector)} numbers, and the heads of {model.name} "
                f"have outputs of {model.d_head}."
            )


def compiled(settings: Settings, model: ServedModel, rank: int = 0, size: int = 1) -> Program:
    """The program of one rank.

    Args:
        settings: checked ones.
        model: the whole model.
        rank, size: which ranks there are, and which this is.

    Example:
        >>> from interp.serving.entry import register
        >>> register()
        >>> from interp_vllm.served import ServedModel
        >>> from interp_vllm.settings import Settings
        >>> gains = {"edit": "scale_heads", "gains": {"L0H1": 0.0, "L1H3": 2.0}}
        >>> model = ServedModel("tiny", (0, 1), 4, 2, 8)
        >>> compiled(Settings((gains,)), model, rank=1, size=2).change(0, False).gain
        tensor([[1., 1.],
                [1., 2.]])
    """
    mine = model.rank(rank, size)
    program = Program(asked=settings.asked)
    for entry in settings.edits:
        local = of_rank(entry, rank * mine.n_heads, mine.n_heads)
        if local is None:
            continue
        stop: int | None
        start, stop = local.pop("queries", None) or (0, None)
        where = Where(str(local.pop("scope", "all")), int(start), stop)
        edit = reader().edit_of(local)
        if edit.is_identity():
            continue
        name = str(local["edit"])
        if name in ("scale_heads", "shift_heads") or (name == "ablate" and edit.mode == "zero"):  # type: ignore[attr-defined]
            program.changes.append((where, _change(edit, mine)))
        else:
            program.inside.append((where, edit))
    return program


def of_rank(entry: Mapping[str, Any], first: int, heads: int) -> dict[str, Any] | None:
    """An edit's JSON with the heads first … first + heads − 1 alone, counted from there; None where
    it names none of them.

    Example:
        >>> of_rank({"edit": "ablate", "heads": ["L0H1", "L2H5"]}, 4, 4)
        {'edit': 'ablate', 'heads': ['L2H1']}
    """
    new = dict(entry)
    for name in BY_HEAD:
        value = entry.get(name)
        if not isinstance(value, (list, tuple, Mapping)):
            continue
        kept = {}
        for written in value:
            head = Head.parse(written)
            if first <= head.head < first + heads:
                at = str(Head(head.layer, head.head - first))
                kept[at] = value[written] if isinstance(value, Mapping) else None
        if not kept:
            return None
        new[name] = kept if isinstance(value, Mapping) else list(kept)
    return new


def _change(edit: Any, model: ServedModel) -> Change:
    """An edit that is a gain and an offset of each head, as tables over the layers."""
    rows, d = {site.layer: i for i, site in enumerate(model.sites)}, model.d_head
    gain = torch.ones(len(rows), model.n_heads)
    offset = torch.zeros(len(rows), model.n_heads, d)
    for site, affine in edit.folded(model).items():
        gain[rows[site.layer]] = affine.gain.float()
        if affine.offset is not None:
            offset[rows[site.layer]] = affine.offset.float()
    return Change(gain, offset if bool(offset.any()) else None)
