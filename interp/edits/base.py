"""What edits share: heads by layer, scope, and their JSON form."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from interp.errors import EditError, InterpError, OutputError
from interp.files import write_atomic
from interp.registry import Registry
from interp_hooks.edit import Edit

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.heads import Head
    from interp_hooks.model import HookedModel

SCOPES = ("all", "prefill", "decode")


class HeadEdit(Edit):
    """An edit of chosen heads (`heads`; None means all) in a scope. Subclasses are frozen dataclasses.

    The JSON form is ``{"edit": name, …fields…}``; heads are written L5H1.
    """

    name: ClassVar[str]
    heads: tuple[Head, ...] | None

    def _check_scope(self) -> None:
        if self.scope not in SCOPES:
            raise EditError(f"The scope of {self.name} is one of {', '.join(SCOPES)}, not {self.scope!r}.")

    def bind(self, model: HookedModel) -> None:
        for head in self.heads or ():
            model.check(head)

    def at(self, site: Site) -> bool:
        """Whether the edit concerns this site at all."""
        if site.kind != "self":
            return False
        if self.heads is None:
            return site.tower in ("", "text")
        return any(h.layer == site.layer and _same_tower(h, site) for h in self.heads)

    def touches(self, call: AttentionCall) -> bool:
        return self.at(call.site) and self.in_scope(call)

    def heads_at(self, site: Site) -> list[int]:
        """The query heads concerned at this site."""
        if self.heads is None:
            return list(range(site.n_heads))
        return sorted({h.head for h in self.heads if h.layer == site.layer and _same_tower(h, site)})

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """The JSON form without the name."""

    def to_json(self) -> dict[str, Any]:
        return {"edit": self.name, **self.fields()}


def _same_tower(head: Head, site: Site) -> bool:
    return head.tower == site.tower or (not head.tower and site.tower == "text")


registry: Registry[type[HeadEdit]] = Registry(
    "edit",
    "interp.edits",
    {"ablate": "interp.edits.ablate:Ablate", "scale_heads": "interp.edits.scale_heads:ScaleHeads"},
    make=lambda cls: cls,  # type: ignore[arg-type, return-value]
)


def to_json(edits: Sequence[HeadEdit]) -> list[dict[str, Any]]:
    """Edits as plain JSON data, in order."""
    return [e.to_json() for e in edits]


def from_json(data: list[dict[str, Any]] | dict[str, Any]) -> list[HeadEdit]:
    """Edits from their JSON form. Raises `UnknownNameError`, `HeadError` or `EditError`."""
    found = []
    entries = [data] if isinstance(data, dict) else data
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise EditError('Edits in JSON are an object, or a list of objects, like {"edit": "scale_heads", …}.')
    for entry in entries:
        fields = dict(entry)
        name = fields.pop("edit", None)
        if name is None:
            raise EditError('An edit in JSON needs its name, like {"edit": "scale_heads", "gains": {"L5H1": 0}}.')
        try:
            found.append(registry.get(str(name))(**fields))
        except InterpError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise EditError(f"The edit {name} does not take these settings: {error}.") from error
    return found


def save(path: str | Path, edits: Sequence[HeadEdit]) -> Path:
    """Write edits to a JSON file that `load` and `--edit FILE.json` read."""
    path = Path(path)
    write_atomic(path, (json.dumps(to_json(edits), indent=2) + "\n").encode())
    return path


def load(path: str | Path) -> list[HeadEdit]:
    """Read edits from a JSON file."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"The edit file {path} can't be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise EditError(f"The edit file {path} is not JSON: {error}.") from error
    return from_json(data)
