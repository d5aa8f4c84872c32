"""Massive activations against the model's own hidden states, and as they are saved and shown."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import interp
from interp.atlas import Atlas
from interp.errors import InputError, OutputError
from interp.results.massive import MassiveActivations
from interp_hooks import hook

DIMENSION, TOKEN = 5, 7


def reference(plain: Any, row: list[int], least: float, ratio: float) -> set[tuple[int, int, int]]:
    """(layer, position, dimension), from hidden states in float64; the last is what leaves the last
    layer, which transformers shows after the final norm."""
    leaving: list[torch.Tensor] = []
    last = plain.model.layers[-1].register_forward_hook(
        lambda module, args, out: leaving.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        states = plain(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
    last.remove()
    found = set()
    for layer, state in enumerate([*states[:-1], leaving[0]]):
        x = state[0].double().abs().numpy()
        middle = np.median(x)
        for position in range(x.shape[0]):
            for dimension in range(x.shape[1]):
                if x[position, dimension] > max(least, ratio * middle):
                    found.add((layer, position, dimension))
    return found


@pytest.fixture(scope="module")
def planted(tokenizer: Any) -> tuple[Any, Any]:
    """A Llama whose token 7 enters the stream with 5,000 in dimension 5."""
    module = tiny.build("llama", len(tokenizer))
    with torch.no_grad():
        module.model.embed_tokens.weight[TOKEN, DIMENSION] = 5000.0
    return hook(module, name="planted", tokenizer=tokenizer), tiny.eager(copy.deepcopy(module))


def test_what_is_planted_is_found(planted: Any) -> None:
    model, plain = planted
    row = [1, 20, TOKEN, 30, 40, TOKEN, 50]
    table = interp.massive_activations(model, inputs=[row], least=100, ratio=1000)
    frame = table.frame
    assert set(zip(frame.layer, frame.position, frame.dimension, strict=True)) == {
        (layer, position, DIMENSION) for layer in range(3) for position in (2, 5)
    }
    assert set(frame.token_id) == {TOKEN}
    first = frame[frame.layer == 0]
    assert (first.value == 5000.0).all()
    x = plain.model.embed_tokens.weight[row].detach().double().abs().numpy()
    np.testing.assert_allclose(first.ratio, 5000 / np.median(x), rtol=1e-5)
    summary = table.summary()
    assert summary.layers.tolist() == ["0–2"] * 2 and set(summary.position) == {2, 5}


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(3, 60), min_size=2, max_size=12),
    st.sampled_from([0.0, 0.03, 0.08, 100.0]),
    st.sampled_from([0.0, 2.0, 4.0, 1000.0]),
)
def test_the_table_is_its_definition(
    planted: Any, row: list[int], least: float, ratio: float
) -> None:
    model, plain = planted
    frame = interp.massive_activations(model, inputs=[row], least=least, ratio=ratio).frame
    found = set(zip(frame.layer, frame.position, frame.dimension, strict=True))
    wanted = reference(plain, row, least, ratio)
    # what stands within rounding of a threshold may fall on either side
    assert len(found ^ wanted) <= 0.01 * max(len(wanted), 1)
    assert ((frame.value.abs() > least) & (frame.ratio > ratio)).all()


def test_saved_loaded_reported(planted: Any, tmp_path: Path) -> None:
    model, _ = planted
    rows = [[1, 20, TOKEN, 30, 40, 50, 60, 9], [1, 2, 3, 4, 5, 6, 8, 9]]
    atlas = interp.scan_heads(model, ["residual_peak"], inputs=rows, progress=False)
    assert atlas.massive is not None and len(atlas.massive.frame) == 3
    assert set(atlas.massive.frame["sample"]) == {0}
    again = Atlas.load(atlas.save(tmp_path))
    assert again.massive is not None and again.massive.frame.equals(atlas.massive.frame)
    assert again.massive.provenance["weights_hash"] == atlas.provenance["weights_hash"]
    page = atlas.report(tmp_path / "report.html").read_text(encoding="utf-8")
    largest = atlas.massive.frame["value"].abs().max()
    assert "Massive activations" in page and f"<td>{largest:,.0f}</td>" in page
    (tmp_path / "massive.parquet").write_bytes(b"other")
    with pytest.raises(OutputError, match="another one"):
        MassiveActivations.load(tmp_path)
    other = interp.scan_heads(model, ["sink"], inputs=rows, progress=False)
    assert other.massive is None
    assert Atlas.load(other.save(tmp_path)).massive is None  # an earlier scan's is not this one's


def test_what_can_t_be_used_is_said(planted: Any) -> None:
    with pytest.raises(InputError, match="negative"):
        interp.massive_activations(planted[0], inputs=[[1, 2, 3]], least=-1)
    with pytest.raises(InputError, match="at least 1 text"):
        interp.massive_activations(planted[0], context=1)
    empty = interp.massive_activations(planted[0], inputs=[[1, 2, 3]])
    assert empty.frame.empty and empty.summary().empty
