"""The formats of score files, in the order in which a file's content is held against them."""

from __future__ import annotations

from typing import Any

from interp.results.interchange.file_format import FileFormat
from interp.support.registry import Registry

_HERE = "interp.results.interchange"


def _make(entry: Any) -> FileFormat:
    return entry() if isinstance(entry, type) else entry


#: name → format; other packages add theirs through the entry-point group `interp.score_files`
registry: Registry[FileFormat] = Registry(
    "format of score files",
    "interp.score_files",
    {
        "retrieval_head": f"{_HERE}.retrieval_head:RetrievalHead",
        "locos": f"{_HERE}.locos:Locos",
        "pasta": f"{_HERE}.head_list:HeadList",
        "values": f"{_HERE}.values:Values",
        "nested": f"{_HERE}.values:Nested",
        "ranked": f"{_HERE}.values:Ranked",
        "records": f"{_HERE}.values:Records",
        "matrix": f"{_HERE}.matrix:Matrix",
        "duo": f"{_HERE}.duo:Duo",
    },
    _make,
)
names, get = registry.names, registry.get
