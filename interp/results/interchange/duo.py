"""DuoAttention's table of gates: a line a layer, a column a key/value head."""

from __future__ import annotations

from typing import Any

from interp.errors import InputError
from interp.results.interchange.entries import LIMIT, Entries, number
from interp.results.interchange.file_format import FileFormat, Rows


class Duo(FileFormat):
    """`full_attention_heads.tsv`: (layers, key/value heads) gates between 0, streaming, and 1, full
    attention (DuoAttention, Xiao et al., ICLR 2025, arXiv 2410.10819).

    `config.json` beside it says how many first and recent tokens a streaming head saw.
    """

    name, what, score = "duo", "DuoAttention TSV", "full_attention"

    def claims(self, content: Any) -> bool:
        return (
            isinstance(content, Rows)
            and bool(content.lines)
            and all(map(_is_number, content.lines[0]))
        )

    def read(self, content: Any) -> Entries:
        lines = content.lines
        widths = {len(row) for row in lines}
        if len(widths) > 1 or len(lines) > LIMIT or max(widths) > LIMIT:
            raise InputError(
                f"A table of gates has a line a layer and a column a key/value head; this one has "
                f"{len(lines)} lines of {min(widths)} to {max(widths)} columns."
            )
        values = {}
        for layer, row in enumerate(lines):
            for head, text in enumerate(row):
                where = f"Layer {layer}, key/value head {head}"
                gate = number(_float(text, where), where)
                if not 0 <= gate <= 1:
                    raise InputError(f"{where} has {gate:g}; a gate is between 0 and 1.")
                values[layer, head] = gate
        return Entries(self.name, self.score, values, grain="kv_head", complete=True)

    def write(self, entries: Entries) -> str:
        if entries.grain != "kv_head":
            raise InputError(
                f"DuoAttention gates key/value heads, and {entries.score} is a score of query "
                'heads; say how a group becomes one with group="mean" or "max".'
            )
        layers, heads = entries.box
        lines = []
        for layer in range(layers):
            row = [entries.values.get((layer, head)) for head in range(heads)]
            if any(v is None or not 0 <= v <= 1 for v in row):
                raise InputError(
                    f"DuoAttention's table has a gate between 0 and 1 for each key/value head; "
                    f"{entries.score} has others, or none, in layer {layer}."
                )
            lines.append("\t".join(f"{value:.18e}" for value in row))
        return "\n".join(lines) + "\n"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _float(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{where} has {text[:40]!r} where a number belongs.") from None
