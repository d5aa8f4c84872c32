"""What is installed is complete: run in the checkout, and by .ci/run against the built wheel
outside of it."""

from __future__ import annotations

from pathlib import Path

import interp
import interp_hooks
import interp_kernels


def test_the_bundled_model_is_packaged_and_scans(tmp_path: Path) -> None:
    model = interp.load("llama")
    atlas = interp.scan_heads(model, scores="sink,induction", context=64, samples=2, progress=False)
    assert atlas.model == "pocket-llama"
    assert len(atlas.frame) == model.n_layers * model.n_heads
    assert atlas.frame["induction"].max() > 0.4
    page = atlas.report(tmp_path / "report.html").read_text(encoding="utf-8")  # from templates
    assert "pocket-llama" in page and "</html>" in page


def test_the_bundled_vision_model_is_packaged_and_sees() -> None:
    model = interp.load("llava")
    assert (model.name, model.towers) == ("pocket-llava", ["vision", "text"])
    result = interp.evaluate(model, "pope", n=24)
    assert result.baseline.mean > 0.6
    atlas = interp.scan_heads(
        model, scores="image_mass,vit_distance", samples=2, context=64, progress=False
    )
    assert atlas.overlays and atlas["image_mass"].max() > 0.5


def test_the_three_packages_come_from_one_place() -> None:
    """An editable install has them in the checkout and its hooks/ and kernels/, a wheel side by
    side."""
    root, hooks, kernels = (
        Path(p.__file__).resolve().parents[1] for p in (interp, interp_hooks, interp_kernels)
    )
    assert (hooks, kernels) in ((root, root), (root / "hooks", root / "kernels"))


def test_the_benchmark_results_are_packaged() -> None:
    from interp.costs.benchmarks import committed

    folder = committed()
    assert folder is not None
    assert {"cpu.json", "h200_kernels.json", "h200_model.json"} <= {
        file.name for file in folder.iterdir()
    }


def test_the_english_passages_are_packaged() -> None:
    folder = Path(interp.__file__).parent / "inputs" / "english"
    assert len(list(folder.glob("*.txt"))) >= 46
