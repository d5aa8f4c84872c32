"""The table of interventions on pictures: every method runs, and what is rendered is what was
measured."""

from __future__ import annotations

import pytest
import torch
import train_pocket_llava as script
import vision_table as table

from interp_hooks import HookedModel, hook


@pytest.fixture(scope="module")
def model() -> HookedModel:
    processor = script.build_processor()
    module = script.build_model(processor.tokenizer, 0)
    with torch.no_grad():  # a sink at the first token, and one in the image, for VAR to find
        module.get_input_embeddings().weight[processor.tokenizer.bos_token_id, 3] = 30.0
    return hook(module, name="random llava", processor=processor)


def test_every_method_is_measured_and_shown(model: HookedModel) -> None:
    result = table.measure(4, 0, model)
    assert set(result["methods"]) >= {
        "greedy",
        "VHR, α = 2",
        "VAR, paper",
        "DAMRO, α = 2, k = 10",
        "random heads × 2",
    }
    shown = table.render_table(result)
    lines = shown.splitlines()
    assert len(lines) == len(result["methods"]) + 4 and lines[2].startswith("| greedy |")
    greedy = result["methods"]["greedy"]["chair broken"]["CHAIR_I"]
    assert greedy["difference"] is None and f"{greedy['baseline']['mean']:.2f}" in lines[2]
    for label, cells in result["methods"].items():
        for task, metric in table.SHOWN.values():
            assert (cells[task][metric]["difference"] is None) == (label == "greedy")


def test_controls_have_as_many_heads(model: HookedModel) -> None:
    drawn = table.random_heads(model, 0)
    assert len(drawn) == len(set(drawn)) == 4 * 3 and {h.layer for h in drawn} == {1, 2, 3}
    assert {h.layer for h in table.fixed_heads(model, 0, n=4)} == {1, 2, 3}
