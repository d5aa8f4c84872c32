"""DuoAttention's file as a `Gate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from interp.edits import Gate, from_json, load, save
from interp.errors import EditError, InputError
from interp_hooks import HookedModel


def write(folder: Path, gates: np.ndarray, **config: object) -> Path:
    np.savetxt(folder / "full_attention_heads.tsv", gates, delimiter="\t")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "full_attention_heads.tsv"


GATES = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])


def test_a_file_is_the_tensor_that_it_holds(tmp_path: Path) -> None:
    path = write(tmp_path, GATES)
    for given in (path, str(path), tmp_path):
        edit = Gate(given)
        torch.testing.assert_close(edit.alpha, torch.tensor(GATES, dtype=torch.float32))
        assert (edit.sink, edit.recent) == (128, 256)


def test_the_sizes_beside_it_are_used_where_none_are_given(tmp_path: Path) -> None:
    path = write(tmp_path, GATES, sink_size=16, recent_size=64)
    assert (Gate(path).sink, Gate(path).recent) == (16, 64)
    assert (Gate(path, 4, 8).sink, Gate(path, 4, 8).recent) == (4, 8)
    assert Gate.read(path, recent=8).sink == 16 and Gate.read(path, recent=8).recent == 8
    write(tmp_path, GATES, model_type="llama")  # a model's config says nothing of gates
    assert (Gate(path).sink, Gate(path).recent) == (128, 256)


def test_it_acts_as_the_tensor_does(pocket: HookedModel, tmp_path: Path) -> None:
    gates = np.linspace(0, 1, pocket.n_layers * pocket.n_kv_heads)
    gates = gates.reshape(pocket.n_layers, pocket.n_kv_heads)
    ids = torch.arange(24)[None]
    logits = []
    for alpha in (write(tmp_path, gates), torch.tensor(gates, dtype=torch.float32)):
        with pocket.edit(Gate(alpha, 1, 4)):
            logits.append(pocket.logits(ids))
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert (logits[0] - pocket.logits(ids)).abs().max() > 1e-3
    with pytest.raises(EditError, match="KV"), pocket.edit(Gate(write(tmp_path, gates[:2]))):
        pass


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_as_many_stream_as_lie_below_the_quantile(tmp_path: Path, sparsity: float) -> None:
    gates = np.random.default_rng(0).random((7, 4))
    used = Gate.read(write(tmp_path, gates), sparsity=sparsity).alpha.numpy()
    below = gates < np.quantile(gates, sparsity) if sparsity < 1 else np.full(gates.shape, True)
    np.testing.assert_array_equal(used == 0, below)


def test_thresholds_and_ties(tmp_path: Path) -> None:
    path = write(tmp_path, GATES)
    assert Gate.read(path, threshold=0.3).alpha.tolist() == [[1, 0], [0, 1], [1, 1]]
    ones = Gate.read(write(tmp_path, np.ones((2, 2))), sparsity=0.5).alpha
    assert ones.tolist() == [[0, 0], [1, 1]]
    with pytest.raises(EditError, match="not by both"):
        Gate.read(path, sparsity=0.5, threshold=0.5)
    with pytest.raises(EditError, match="between 0 and 1"):
        Gate.read(path, sparsity=1.5)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content, name in (
        ({"0-1": [0.5]}, "retrieval_head"),
        ([[128, 256, 64], [1, 2, 3]], "matrix"),
        ({"0": [1]}, "pasta"),
    ):
        path = tmp_path / "scores.json"
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"format {name}, and gates are DuoAttention's"):
            Gate(path)


def test_an_edit_file_holds_the_gates_and_names_no_other(tmp_path: Path) -> None:
    edit = Gate.read(write(tmp_path, GATES), sparsity=0.5)
    again = load(save(tmp_path / "edit.json", [edit]))[0]
    assert isinstance(again, Gate)
    torch.testing.assert_close(again.alpha, edit.alpha)
    with pytest.raises(EditError, match="holds the gates themselves"):
        from_json({"edit": "gate", "alpha": str(tmp_path / "full_attention_heads.tsv")})


def test_gates_are_written_as_duo_attention_reads_them(tmp_path: Path) -> None:
    """By its own loader's steps: numpy's text, clipped to 0 and 1; sizes from the config."""
    alpha = torch.rand(3, 2, generator=torch.Generator().manual_seed(0))
    folder = Gate(alpha, sink=4, recent=28).write(tmp_path / "new" / "gates")
    table = np.loadtxt(folder / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    np.testing.assert_array_equal(np.clip(table, 0, 1), alpha.double().numpy())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config == {"sink_size": 4, "recent_size": 28}
    again = Gate.read(folder)
    assert torch.equal(again.alpha, alpha) and (again.sink, again.recent) == (4, 28)
    with pytest.raises(EditError, match="every KV head"):
        Gate({"L0H1": 0.5}).write(tmp_path / "some")
