"""What edits share: heads by layer, scope, and their JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from interp.edits.checks import count, real
from interp.edits.keys import Span, bound, names_text, query_rows
from interp.edits.tensors import stored
from interp.errors import EditError
from interp.support.html import block, listed
from interp.support.presets import settings_of
from interp_hooks.edit import BoundEdit, CallEdit, Edit
from interp_hooks.heads import CROSS, Head, parse_heads
from interp_hooks.whole_numbers import whole

if TYPE_CHECKING:
    from typing_extensions import Self

    from interp.edits.fold import Affine
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model

SCOPES = ("all", "prefill", "decode")


class HeadEdit(Edit):
    """An edit of chosen heads in a scope: the base class of all edits here.

    Subclasses are frozen dataclasses with a field `heads` (None means all) and a field `scope`;
    where they have a field `queries`, it is the token range (start, stop; None for no end) of the
    rows edited, counted from each sample's first real token.

    The JSON form is ``{"edit": name, …fields…}``; heads are written L5H1, spans of keys 2:5, texts
    of the prompt "text:the instruction".

    Raises:
        EditError: a scope that is none, or a query range that is none.
        HeadError: a head that can't be read; on entry, one that the model has not.

    Example:
        >>> edit = interp.edits.ZeroTuning(2.0, heads=["L1H0", (2, 3)])
        >>> isinstance(edit, interp.edits.HeadEdit), edit.heads
        (True, (L1H0, L2H3))
    """

    name: ClassVar[str]
    #: whether it may act in cross-attention, whose keys are another input's; its heads are named
    #: there one by one, cross.L1H2
    crosses: ClassVar[bool] = False
    #: settings under a name: {"paper": {}, "code": {"threshold": 0.1}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    heads: tuple[Head, ...] | None

    def __post_init__(self) -> None:
        """Heads in any spelling become `Head`s; the scope and the query range are checked."""
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple(parse_heads(self.heads)))
        self._check_scope()
        queries = getattr(self, "queries", None)
        if queries is not None:
            object.__setattr__(self, "queries", _range(queries, self.name))

    @classmethod
    def preset_settings(cls, preset: Any) -> dict[str, Any]:
        """The settings of a preset; none for None. Raises `EditError` for a name that is none."""
        return settings_of(f"edit {cls.name}", preset, cls.presets, EditError)

    def is_identity(self) -> bool:
        queries = getattr(self, "queries", None)
        return self.concerned == () or (queries is not None and queries[0] == queries[1])

    @property
    def concerned(self) -> tuple[Head, ...] | None:
        """The heads that the edit names; None for all."""
        return self.heads

    def query_rows(self, call: AttentionCall) -> torch.Tensor | None:
        """(batch, queries) bool: the rows in `queries`; None for all."""
        return query_rows(call, getattr(self, "queries", None))

    def chosen(self, site: Site, device: torch.device) -> torch.Tensor:
        """(query heads,) bool: the heads concerned at this site."""
        mask = torch.zeros(site.n_heads, dtype=torch.bool)
        mask[self.heads_at(site)] = True
        return mask.to(device)

    def _check_scope(self) -> None:
        if self.scope not in SCOPES:
            raise EditError(
                f"The scope of {self.name} is one of {', '.join(SCOPES)}, not {self.scope!r}."
            )

    def _number(self, name: str) -> Any:
        """A setting as Python's number; None stays. Raises `EditError` for what is none."""
        value = getattr(self, name)
        return None if value is None else real(value, f"{name} of {self.name}")

    def _count(self, name: str) -> Any:
        """A setting as Python's whole number; None stays. Raises `EditError` for what is none."""
        value = getattr(self, name)
        return None if value is None else count(value, f"{name} of {self.name}")

    def check_model(self, model: Model) -> None:
        """Raise `HeadError` or `EditError` where the edit cannot apply to `model`."""
        for head in self.concerned or ():
            model.check(head)
            if head.tower == CROSS and all(s.tower != CROSS for s in model.sites):
                self._check_cross(head)

    def _check_cross(self, head: Head) -> None:
        """Raise `EditError` where the edit is not defined in cross-attention."""
        mode, rule = getattr(self, "mode", "zero"), getattr(self, "rule", None)
        if not self.crosses or mode not in ("zero", "uniform") or rule is not None:
            raise EditError(
                f"{self.name} as it is can't edit {head}, whose keys are another input's; in "
                "cross-attention scale_heads, shift_heads, ablate (zero or uniform), temperature "
                "(without a rule), scale_tokens and move_mass act."
            )
        if getattr(self, "queries", None) is not None:
            raise EditError(
                f"{self.name} can't tell rows of {head} by their positions; leave queries= out."
            )

    def bind(self, model: Model) -> CallEdit:
        self.check_model(model)
        return BoundEdit(self.reading(model))

    def folded(self, model: Model) -> Mapping[Site, Affine]:
        """What the edit does to z at each site that it concerns, where that is the same for every
        token and prompt, so that weights can hold it.

        Raises:
            EditError: it is not the same.
        """
        raise EditError(
            f"{self.name} can't be baked into W_O: what it does to z depends on the prompt. It "
            "acts while a model runs (model.edit, --edit); scale_heads, shift_heads and ablate "
            "(zero, mean) can be baked."
        )

    def check_unbounded(self) -> None:
        """Raise `EditError` unless it acts on every token, as weights do."""
        queries = getattr(self, "queries", None)
        if self.scope != "all" or queries not in (None, (0, None)):
            where = f"scope {self.scope}" if self.scope != "all" else f"queries {queries}"
            raise EditError(
                f"{self.name} with {where} can't be baked into weights, which act on every token; "
                "leave that out, or use it while the model runs (model.edit, --edit)."
            )

    def reading(self, model: Model) -> Self:
        """The edit with the texts among its keys found in the prompts of `model`, for one block;
        itself where it names none.

        Raises `EditError` for a model without a tokenizer.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        texts = {k: bound(v, model) for k, v in values.items() if names_text(v)}
        return dataclasses.replace(self, **texts) if texts else self  # type: ignore[type-var]

    @property
    def needs_tokens(self) -> bool:
        """Whether its keys name a text of the prompt."""
        return any(names_text(getattr(self, f.name, None)) for f in dataclasses.fields(self))  # type: ignore[arg-type]

    def at(self, site: Site) -> bool:
        """Whether the edit concerns this site at all."""
        heads = self.concerned
        if heads is None:
            return site.kind == "self" and site.tower in ("", "text")
        return any(h.layer == site.layer and same_tower(h, site) for h in heads)

    def touches(self, call: AttentionCall) -> bool:
        if not (self.at(call.site) and self.in_scope(call)):
            return False
        queries, mask = getattr(self, "queries", None), call.mask
        if queries is None or mask.starts is not None:
            return True
        return mask.q_start + call.n_queries > queries[0] and (
            queries[1] is None or mask.q_start < queries[1]
        )

    def heads_at(self, site: Site) -> list[int]:
        """The query heads concerned at this site."""
        heads = self.concerned
        if heads is None:
            return list(range(site.n_heads))
        return sorted({h.head for h in heads if h.layer == site.layer and same_tower(h, site)})

    def check_whole_layers(self, model: Model, instead: str = "") -> None:
        """Raise `EditError` where only some heads of a layer are meant: for edits that cannot tell
        heads apart."""
        for site in model.sites:
            if self.at(site) and len(self.heads_at(site)) < site.n_heads:
                raise EditError(
                    f"{self.name} edits all heads of a layer or none, and of layer {site.layer} "
                    "only some are "
                    f"named{'; ' + instead if instead else ''}."
                )

    def fields(self) -> dict[str, Any]:
        """The JSON form without the name; tensors of more than one number as they are."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]

    @property
    def phrase(self) -> str:
        """The edit in a few words: its name, its heads, and what is not as by default.

        Example:
            >>> interp.edits.Ablate(["L17H3", "L18H6"]).phrase
            'Ablate L17H3, L18H6; mode zero'
        """
        usual = {f.name: f.default for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        values = self.fields()
        heads = values.pop("heads", None)
        if not heads and self.concerned:
            heads = [str(h) for h in self.concerned]
        said = [
            f"{name.replace('_', ' ')} {listed(value)}"
            for name, value in values.items()
            if name == "mode" or not _same(value, usual.get(name))
        ]
        return "; ".join(
            [f"{type(self).__name__} {listed(heads) if heads else 'all heads'}", *said]
        )

    def _repr_html_(self) -> str:
        said = (type(self).__doc__ or "").strip().split("\n\n")[0]
        fields = {k: "all" if k == "heads" and v is None else v for k, v in self.fields().items()}
        if self.heads is None and "heads" not in fields and self.concerned:
            fields["heads"] = [str(h) for h in self.concerned]
        return block(type(self).__name__, facts=fields, notes=[" ".join(said.split())])

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The edit of JSON fields. Raises what the edit does."""
        return cls(**fields)

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
        """The JSON form; tensors go to safetensors files in `folder`, and without one they are an
        `EditError`."""
        return {
            "edit": self.name,
            **{k: stored(v, folder, self.name) for k, v in self.fields().items()},
        }


def _plain(value: Any) -> Any:
    """As JSON holds it, but for tensors of more than one number."""
    if isinstance(value, Head):
        return str(value)
    if isinstance(value, Span):
        return str(value)
    if isinstance(value, (torch.Tensor, np.generic)) and value.ndim == 0:
        return value.item()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _same(value: Any, usual: Any) -> bool:
    """Whether a JSON value is a field's default; never for tensors."""
    return not isinstance(value, torch.Tensor) and bool(value == _plain(usual))


def _range(queries: Any, name: str) -> tuple[int, int | None]:
    """(start, stop) of a query range. Raises `EditError`."""
    pair = queries if isinstance(queries, (tuple, list)) and len(queries) == 2 else (None, 0)
    start, stop = whole(pair[0]), whole(pair[1])
    ends = pair[1] is None or (stop is not None and start is not None and stop >= start)
    if start is None or start < 0 or not ends:
        raise EditError(
            f"The queries of {name} are a range of tokens (start, stop), from 0, not {queries!r}."
        )
    return start, stop


def same_tower(head: Head, site: Site) -> bool:
    """Whether a head of this name may stand at a site; cross-attention is a tower of its own."""
    if site.kind == "cross":
        return head.tower == CROSS
    return head.tower == site.tower or (not head.tower and site.tower == "text")
