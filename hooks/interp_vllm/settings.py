"""What one request asks of the engine's heads, as JSON says it: edits, and statistics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from interp_hooks.whole_numbers import quoted, whole
from interp_vllm.errors import ServingError

#: statistics of a generated token; see `Asked`
STATISTICS = ("entropy", "first", "off_sink", "groups", "topk")
#: rows that a request's statistics hold at most
CAP = 4096
#: most groups, and most top keys
MOST = 16


@dataclass(frozen=True)
class Asked:
    """The statistics that a request wants of every head, for each token that it generates.

    Row t is of the query whose output became generated token t: the prompt's last token for the
    first, each generated token for the next one.

    Args:
        names: of `STATISTICS`: "entropy" −Σ A ln A in nats; "first" the mass on the first token;
            "off_sink" the mass on all others; "groups" the mass on each of `groups`; "topk" the
            strongest keys.
        groups: name → (start, stop) token positions.
        topk: how many of the strongest keys.
        stage: "before" the request's edits act in that layer, or "after".
        cap: how many tokens at most; later ones are counted, not kept.

    Raises:
        ServingError: a name that is none, numbers out of range.

    Example:
        >>> Asked.read(["entropy", "first"]).names
        ('entropy', 'first')
        >>> Asked.read({"groups": {"needle": "5:9"}}).groups
        {'needle': (5, 9)}
    """

    names: tuple[str, ...]
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    topk: int = 5
    stage: str = "before"
    cap: int = CAP

    @classmethod
    def read(cls, data: Any) -> Asked:
        """From its JSON: a list of names, or an object of the fields. Raises `ServingError`."""
        if isinstance(data, (list, tuple)):
            data = {"names": list(data)}
        fields = {"names", "groups", "topk", "stage", "cap"}
        if not isinstance(data, Mapping) or (unknown := sorted(set(map(str, data)) - fields)):
            what = quoted(data) if not isinstance(data, Mapping) else ", ".join(unknown)
            raise ServingError(
                f"Statistics are a list of names, or an object with {', '.join(sorted(fields))}, "
                f"not {what}."
            )
        groups = {str(k): _span(v, k) for k, v in _mapping(data.get("groups")).items()}
        names = data.get("names") or []
        if not isinstance(names, (list, tuple)):
            raise ServingError(f"The names of statistics are a list, not {quoted(names)}.")
        extra = (("groups",) if groups else ()) + (("topk",) if "topk" in data else ())
        made = cls(
            tuple(dict.fromkeys((*names, *extra))),
            groups,
            _count(data.get("topk", 5), "topk", MOST),
            data.get("stage", "before"),
            _count(data.get("cap", CAP), "cap", 1 << 20),
        )
        made.check()
        return made

    def check(self) -> None:
        """Raise `ServingError` for what is no statistic."""
        for name in self.names:
            if name not in STATISTICS:
                raise ServingError(
                    f"There is no statistic {quoted(name)}; there are {', '.join(STATISTICS)}."
                )
        if not self.names:
            raise ServingError(f"Name a statistic: one of {', '.join(STATISTICS)}.")
        if ("groups" in self.names) != bool(self.groups) or len(self.groups) > MOST:
            raise ServingError(
                f'The statistic "groups" needs 1 to {MOST} groups, like '
                '{"groups": {"needle": "5:9"}}.'
            )
        if self.stage not in ("before", "after"):
            raise ServingError(f"Statistics are before or after edits, not {quoted(self.stage)}.")

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        said: dict[str, Any] = dict(names=list(self.names), stage=self.stage, cap=self.cap)
        if self.groups:
            said["groups"] = {name: f"{a}:{b}" for name, (a, b) in self.groups.items()}
        if "topk" in self.names:
            said["topk"] = self.topk
        return said


@dataclass(frozen=True)
class Settings:
    """What a request asks: edits in their JSON form, in order, and statistics.

    Example:
        >>> one = Settings.read('{"edits": [{"edit": "scale_heads", "gains": {"L5H1": 0}}]}')
        >>> one.edits[0]["edit"], one.asked
        ('scale_heads', None)
    """

    edits: tuple[Mapping[str, Any], ...] = ()
    asked: Asked | None = None

    @classmethod
    def read(cls, value: Any) -> Settings:
        """From an object with `edits` and `statistics`, or its JSON text (over HTTP the engine
        takes texts and numbers alone). Raises `ServingError`."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ServingError(f'"interp" of a request is not JSON: {error}.') from None
        if not isinstance(value, Mapping) or not set(value) <= {"edits", "statistics"}:
            raise ServingError(
                '"interp" of a request is an object with edits and statistics, not '
                f"{quoted(value)}."
            )
        edits = value.get("edits") or []
        edits = [edits] if isinstance(edits, Mapping) else edits
        if not isinstance(edits, (list, tuple)) or not all(isinstance(e, Mapping) for e in edits):
            raise ServingError(
                "Edits of a request are a list of objects, as interp.edits.to_json makes them, not "
                f"{quoted(edits)}."
            )
        asked = value.get("statistics")
        return cls(tuple(edits), None if asked is None else Asked.read(asked))

    def text(self) -> str:
        """The JSON text, the same for the same settings."""
        data: dict[str, Any] = {"edits": list(self.edits)}
        if self.asked is not None:
            data["statistics"] = self.asked.to_json()
        return json.dumps(data, sort_keys=True)

    @property
    def salt(self) -> str | None:
        """What keeps keys and values under these edits apart from all others in a prefix cache;
        None without edits, which share what every request shares."""
        if not self.edits:
            return None
        text = json.dumps(list(self.edits), sort_keys=True)
        return f"interp-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _mapping(value: Any) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ServingError(f"Groups of keys are name → span, not {quoted(value)}.")
    return value


def _span(value: Any, name: Any) -> tuple[int, int]:
    """(start, stop) of "5:9" or [5, 9]. Raises `ServingError`."""
    pair = value.split(":") if isinstance(value, str) else value
    if isinstance(pair, (list, tuple)) and len(pair) == 2:
        try:
            start, stop = (int(x) if isinstance(x, str) else whole(x) for x in pair)
        except ValueError:
            start = stop = None
        if start is not None and stop is not None and 0 <= start < stop:
            return start, stop
    raise ServingError(f'The group {quoted(name)} is a span like "5:9", not {quoted(value)}.')


def _count(value: Any, what: str, most: int) -> int:
    number = whole(value)
    if number is None or not 1 <= number <= most:
        raise ServingError(f"{what} of statistics is a number from 1 to {most}, not {value!r}.")
    return number
