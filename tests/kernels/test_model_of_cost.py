"""The forward's speed on paper: the arithmetic of the model, and what the page says of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
sys.path.append(str(HERE / "kernels" / "benchmarks"))

import model_of_cost as model  # noqa: E402


def test_products_alone_run_at_the_rate_of_a_large_product() -> None:
    one = model.Tile(products=100.0, softmax=0.0, flop=100.0 * model.TENSOR)
    assert one.tflops(0.0) == pytest.approx(788)


def test_what_hides_behind_the_other_takes_no_time() -> None:
    one = model.tile(128, 128, 128, loop=512)
    assert (one.products, one.softmax) == (2048, 1024)  # 8.4 MFLOP; 512 instructions of 8 warps
    assert one.tflops(1.0) == pytest.approx(788)
    assert one.tflops(0.0) == pytest.approx(788 * 2 / 3)
    assert one.hidden(one.tflops(0.3)) == pytest.approx(0.3)


def test_exponentials_bound_a_short_loop() -> None:
    assert model.tile(128, 128, 64, loop=10).softmax == 128 * 128 / 16


def test_the_check_is_on_kernels_that_the_model_was_not_made_from() -> None:
    tiles = model.ours(model.json.loads(model.RESULTS.read_text())["families"]["90"])
    told = model.checked(tiles)
    assert len(told) == 2 and {one.dim for one, _ in told} == {64}
    assert all(abs(speed / one.tflops - 1) < 0.15 for one, speed in told)
    specialised = [one for what, (how, one) in tiles.items() if how == model.SPECIALISED]
    assert len(specialised) == 8


def test_the_page_has_the_tables() -> None:
    page = (HERE / "docs" / "kernels.md").read_text(encoding="utf-8")
    between = page.split(model.BEGIN)[1].split(model.END)[0]
    assert between.strip() == model.markdown()
