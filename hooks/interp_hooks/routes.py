"""What `explain` says of a model's layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from interp_hooks.call import Site


def table(
    sites: Sequence[Site], edits: Sequence[Any], routes: Mapping[Site, Mapping[str, str]]
) -> str:
    """A line for neighbouring layers that go the same way: what the edits do there, and which
    kernels run at prefill and decode (`routes`)."""
    lines = []
    for site in sites:
        mine = [e.route(site) for e in edits if e.at(site)]
        ways = [f"{step} by {route}" for step, route in routes[site].items()]
        what = "; ".join(mine + ways) if mine else "untouched weights"
        lines.append((f"{site.tower or site.kind} layer", site.layer, what))
    return "\n".join(_grouped(lines))


def _grouped(lines: Sequence[tuple[str, int, str]]) -> Iterator[str]:
    """One line for neighbouring layers that go the same way."""
    for (kind, what), group in itertools.groupby(lines, key=lambda line: (line[0], line[2])):
        layers = [layer for _, layer, _ in group]
        yield (
            f"{kind} {layers[0]}: {what}"
            if len(layers) == 1
            else f"{kind}s {layers[0]}–{layers[-1]}: {what}"
        )
