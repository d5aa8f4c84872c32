"""Committed notebooks: every plot is there as a picture too, outputs name no machine, and a model
that can't be fetched is one sentence."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import interp
from interp.errors import ModelError

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "README.md").is_file())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
#: notebooks that read the real model, which their first cell fetches
REAL = ("01_scan_heads", "02_steer_attention", "03_vision_heads", "04_circuits")

each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def code_cells(file: Path) -> list[Any]:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@each
def test_every_plot_is_a_picture_too(file: Path) -> None:
    outputs = [o.get("data", {}) for cell in code_cells(file) for o in cell["outputs"]]
    plots = [data for data in outputs if PLOTLY in data]
    assert plots
    for data in plots:
        layout = data[PLOTLY]["layout"]
        with Image.open(io.BytesIO(base64.b64decode("".join(data["image/png"])))) as picture:
            assert picture.format == "PNG"
            # of the figure's shape, in at least its pixels, and with something on it
            wide, high = layout.get("width") or 900, layout.get("height") or 450
            assert picture.width >= wide
            assert picture.width / picture.height == pytest.approx(wide / high, rel=0.02)
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 16


@each
def test_all_cells_were_run_in_order(file: Path) -> None:
    counts = [cell["execution_count"] for cell in code_cells(file)]
    assert counts == list(range(1, len(counts) + 1))


@each
def test_outputs_name_no_machine(file: Path) -> None:
    said = [dict(output) for cell in code_cells(file) for output in cell["outputs"]]
    for output in said:  # a picture's letters may spell anything
        output["data"] = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
    outputs = json.dumps(said)
    assert not re.search(r"(?<![\w.])/(tmp|root|home|usr|work|Users)/|\\\\Users", outputs)
    assert '"stderr"' not in outputs and '"error"' not in outputs


@pytest.mark.parametrize("stem", REAL)
def test_without_the_model_there_is_one_sentence(
    stem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str) -> None:
        raise ModelError("No registry answers.")

    monkeypatch.setattr(interp.models, "get", unreachable)
    first = "".join(code_cells(ROOT / "notebooks" / f"{stem}.ipynb")[0]["source"])
    with pytest.raises(SystemExit, match=r"SmolLM2-135M.*No registry answers\.$"):
        exec(first, {})
