"""What Jupyter shows of a result: a line, facts, a table, remarks; small, and in its own colours.

No style sheet, no script and no colour of its own, so that it is read on a dark page as on a light
one; everything that is given is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_CELL = 'style="text-align: left; padding: .1em 1em .1em 0; vertical-align: top; border: 0"'
_FIGURE = 'style="text-align: right; padding: .1em 1em .1em 0; border: 0"'
_TABLE = 'style="border-collapse: collapse; margin: .3em 0; font-size: inherit"'
#: items of a list that are shown
MOST = 12


def block(
    title: str,
    about: str = "",
    facts: Mapping[str, Any] | None = None,
    headings: Sequence[str] = (),
    rows: Iterable[Sequence[Any]] = (),
    notes: Iterable[str] = (),
) -> str:
    """HTML of a result.

    Args:
        title: what it is, in bold; `about`: more of it, on the same line.
        facts: name → value; those that are None or empty are left out.
        headings, rows: a table; columns after the first hold numbers.
        notes: sentences below.

    Example:
        >>> from interp.support.html import block
        >>> block("a < b", notes=["so it is"])
        '<div><div><strong>a &lt; b</strong></div><div><em>so it is</em></div></div>'
    """
    parts = [f"<div><strong>{escape(title)}</strong>{escape(f', {about}' if about else '')}</div>"]
    there = {name: value for name, value in (facts or {}).items() if value not in (None, "", ())}
    if there:
        lines = "".join(
            f"<tr><td {_CELL}>{escape(name)}</td><td {_CELL}>{escape(listed(value))}</td></tr>"
            for name, value in there.items()
        )
        parts.append(f"<table {_TABLE}><tbody>{lines}</tbody></table>")
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    if body:
        head = f"<thead><tr>{_cells('th', headings)}</tr></thead>" if headings else ""
        parts.append(f"<table {_TABLE}>{head}<tbody>{body}</tbody></table>")
    parts += [f"<div><em>{escape(note)}</em></div>" for note in notes if note]
    return f"<div>{''.join(parts)}</div>"


def _cells(tag: str, values: Sequence[Any]) -> str:
    return "".join(
        f"<{tag} {_FIGURE if i else _CELL}>{escape(listed(value))}</{tag}>"
        for i, value in enumerate(values)
    )


def listed(value: Any) -> str:
    """A value as text: lists with commas, and no longer than a reader wants it."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        value = [f"{k}: {listed(v)}" for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset):
        several = list(value)
        more = f", … ({len(several)})" if len(several) > MOST else ""
        return ", ".join(listed(v) for v in several[:MOST]) + more
    if getattr(value, "ndim", None):
        return f"tensor {tuple(value.shape)}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 400 else f"{text[:399]}…"
