"""Runs the notebooks in place and keeps a picture of each plot beside the interactive one.

    python notebooks/run.py                       # all of them
    python notebooks/run.py 01_scan_heads.ipynb
    python notebooks/run.py --images-only         # draw the pictures again, run nothing

Sites that show code run no JavaScript: of an output with several forms they show the PNG. Whoever
runs a notebook needs none of this; pictures are drawn here, before a notebook is committed, so that
only this script needs a browser (Chromium or Chrome).
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: pixels of a figure that names no size, and screen pixels for each of them
WIDTH, HEIGHT, SCALE = 900, 450, 1.5


def main() -> None:
    """Run and draw the notebooks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="file names in this folder; all if not given")
    parser.add_argument("--images-only", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    files = [HERE / Path(name).name for name in chosen.notebooks] or sorted(HERE.glob("*.ipynb"))
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if browser is None:
        sys.exit(f"Pictures are drawn by a browser; install one of {', '.join(BROWSERS)}.")
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        if not chosen.images_only:
            run(notebook)
        print(f"{file.name}: {draw(notebook, browser)} pictures")
        nbformat.write(notebook, file)


def run(notebook: Any) -> None:
    """Executes all cells; an error in one is raised, and nothing is written."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    # of the progress bars of others, where Jupyter's widgets are not installed
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    where = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=None, record_timing=False, resources=where).execute()


def draw(notebook: Any, browser: str) -> int:
    """Adds a PNG to each output that holds a plot; returns how many."""
    outputs = [
        output["data"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if PLOTLY in output.get("data", {})
    ]
    for data in outputs:
        plot = data[PLOTLY]
        figure = go.Figure(data=plot["data"], layout=plot["layout"], skip_invalid=True)
        data[PNG] = base64.b64encode(png(figure, browser)).decode("ascii") + "\n"
    return len(outputs)


def png(figure: go.Figure, browser: str) -> bytes:
    """The figure on white, as a browser draws it."""
    width = int(figure.layout.width or WIDTH)
    height = int(figure.layout.height or HEIGHT)
    figure.update_layout(width=width, height=height, paper_bgcolor="white")
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        body = figure.to_html(include_plotlyjs=True, config={"staticPlot": True})
        page.write_text(f"<style>body {{ margin: 0 }}</style>{body}", encoding="utf-8")
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
            f"--force-device-scale-factor={SCALE}",
            "--virtual-time-budget=8000",
            f"--screenshot={shot}",
            page.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with Image.open(shot) as picture:
            small = io.BytesIO()
            picture.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    main()
