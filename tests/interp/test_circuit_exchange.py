"""Graph files of EAP-IG and MIB, and methods of one's own, against what their formats say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import interp
from interp import circuits
from interp.circuits.graph_shape import GraphShape
from interp.cli.main import app
from interp.errors import HeadError, InputError, OutputError


@pytest.fixture(scope="module")
def model() -> Any:
    return interp.load("llama")


@pytest.fixture(scope="module")
def eap(model: Any) -> Any:
    return circuits.find(model, "ioi", "eap", n=4)


def written(tmp_path: Path, circuit: Any, **more: Any) -> dict[str, Any]:
    return json.loads(circuits.write_graph(circuit, tmp_path / "g.json", **more).read_text())


def test_all_edges_are_listed() -> None:
    """GPT-2 small has 32,491 edges (Hanna et al. 2024)."""
    names = list(GraphShape(12, 12, None, False, 768).edges())
    assert len(names) == len(set(names)) == 32491
    assert names[0] == "input->a0.h0<q>" and names[-1] == "m11->logits"
    parallel = set(GraphShape(2, 2, None, True, 8).edges())
    assert "a0.h1->m0" not in parallel and "a0.h1->m1" in parallel


def test_a_file_has_every_score_under_their_names(tmp_path: Path, model: Any, eap: Any) -> None:
    said = written(tmp_path, eap)
    assert said["cfg"] == dict(n_layers=4, n_heads=8, parallel_attn_mlp=False, d_model=128)
    assert list(said["nodes"])[:3] == ["input", "a0.h0", "a0.h1"]
    assert said["nodes"]["logits"] == {"in_graph": True} and "m3" in said["nodes"]
    assert set(said["edges"]) == set(GraphShape(4, 8, None, False, 128).edges())
    ours = eap.edges.set_index(["sender", "receiver", "kind"])["score"]
    for layer, head in ((1, 3), (3, 6)):
        q = said["edges"][f"m0->a{layer}.h{head}<q>"]
        assert q["score"] == pytest.approx(float(ours["MLP 0", f"L{layer}H{head}", "q"]))
        for kind in "kv":  # two query heads share a key-value head: the sum stays
            pair = [said["edges"][f"m0->a{layer}.h{h}<{kind}>"]["score"]
                    for h in (head // 2 * 2, head // 2 * 2 + 1)]  # fmt: skip
            assert pair[0] == pair[1]
            assert sum(pair) == float(ours["MLP 0", f"L{layer}KV{head // 2}", kind])
    assert said["edges"]["a2.h1->logits"]["score"] == float(ours["L2H1", "output", ""])
    total = sum(e["score"] for e in said["edges"].values())
    assert total == pytest.approx(float(eap.edges["score"].astype(float).sum()), rel=1e-6)


def test_read_back_it_is_the_same(tmp_path: Path, model: Any, eap: Any) -> None:
    path = circuits.write_graph(eap, tmp_path / "g.json")
    graph = circuits.read_graph(path, kv_heads=model.n_kv_heads)
    keys = ["sender", "receiver", "kind"]
    one, two = (e.set_index(keys)["score"].sort_index() for e in (eap.edges, graph.edges))
    pd.testing.assert_series_equal(one, two, check_exact=True)
    np.testing.assert_array_equal(graph.frame["graph"], eap.frame["eap"].astype(np.float32))
    np.testing.assert_allclose(graph.frame["effect"], eap.frame["eap_effect"], atol=1e-5)
    assert graph.frame["kv_head"].tolist() == eap.frame["kv_head"].tolist()
    apart = circuits.read_graph(path)  # as their users see it
    assert "L2H3" in set(apart.edges.query("kind == 'k'")["receiver"])
    assert circuits.evaluate(graph, ["L2H3", "L3H1"]).auc == pytest.approx(
        circuits.evaluate(eap, ["L2H3", "L3H1"]).auc
    )


def test_signs_and_sizes(tmp_path: Path, eap: Any) -> None:
    said, reverse = written(tmp_path, eap), written(tmp_path, eap, sign="metric")
    name = "m0->logits"
    assert said["edges"][name]["score"] == -reverse["edges"][name]["score"] != 0
    back = circuits.read_graph(tmp_path / "g.json", sign="metric", kv_heads=4)
    assert back.edges["score"].iloc[0] == eap.edges["score"].iloc[0]
    few = written(tmp_path, eap, k=5)
    inside = {n for n, e in few["edges"].items() if e["in_graph"]}
    assert 5 <= len(inside) <= 10  # a shared key-value head is two of theirs
    assert {n.split("->")[0] for n in inside} - {"input"} == {
        n for n, node in few["nodes"].items() if node["in_graph"]
    } - {"input", "logits"}


def test_heads_without_edges_are_nodes(tmp_path: Path, model: Any) -> None:
    found = circuits.find(model, "ioi", "head_ablation", n=4)
    said = written(tmp_path, found, k=3)
    for row in found.frame.itertuples():
        node = said["nodes"][f"a{row.layer}.h{row.head}"]
        assert node["score"] == pytest.approx(row.head_ablation_effect)
    assert sum(said["nodes"][f"a{i}.h{j}"]["in_graph"] for i in range(4) for j in range(8)) == 3
    assert "score" not in said["nodes"]["m0"]  # not scored, which is kept there
    graph = circuits.read_graph(tmp_path / "g.json")
    np.testing.assert_array_equal(graph.frame["effect"], found.frame["head_ablation_effect"])
    assert graph.frame["in_graph"].sum() == 3


def test_what_is_no_graph_is_refused(tmp_path: Path, eap: Any) -> None:
    good = written(tmp_path, eap)
    path = tmp_path / "bad.json"

    def refused(match: str, change: Any = None, text: str | None = None, **more: Any) -> None:
        said = json.loads(json.dumps(good))
        if change is not None:
            change(said)
        path.write_text(json.dumps(said) if text is None else text)
        with pytest.raises(InputError, match=match):
            circuits.read_graph(path, **more)

    refused("not whole JSON", text="{")
    refused("parts cfg", lambda s: s.pop("edges"))
    refused("n_layers", lambda s: s["cfg"].pop("n_layers"))
    refused("has not", lambda s: s["edges"].update({"m3->m1": dict(score=1.0, in_graph=True)}))
    refused("has not", lambda s: s["nodes"].update({"a9.h0": dict(in_graph=True)}))
    refused("finite", lambda s: s["edges"]["m0->logits"].update(score=math.nan))
    refused("finite", lambda s: s["edges"]["m0->logits"].update(score="x"))
    refused("whether", lambda s: s["edges"]["m0->logits"].pop("in_graph"))
    refused("no score", lambda s: s.update(edges={}))
    refused("kv_heads", kv_heads=3)
    refused("sign", sign="up")
    with pytest.raises(InputError, match="pickle"):
        circuits.read_graph(tmp_path / "importances.pt")
    with pytest.raises(OutputError):
        circuits.read_graph(tmp_path / "none.json")
    for wrong in (dict(k=0), dict(k=True), dict(sign="x")):
        with pytest.raises(InputError):
            circuits.write_graph(eap, path, **wrong)


# --- methods of one's own

CODE = '''
import numpy as np, pandas as pd
from dataclasses import dataclass

@dataclass
class Sizes:
    layers: int
    heads: int

def ramp(model, prompts):
    """Later heads count more."""
    size = Sizes(model.n_layers, model.n_heads)
    return np.arange(size.layers * size.heads).reshape(size.layers, size.heads)

def signed(model, prompts):
    return {str(h): -1.0 if h.layer else 2.0 for h in model.heads}

def some(model, prompts):
    return {"L0H1": 1.0}

def unknown(model, prompts):
    return {**signed(model, prompts), "L9H9": 1.0}

def no_head(model, prompts):
    return {"what": 1.0}

def words(model, prompts):
    return {str(h): "x" for h in model.heads}

def nan(model, prompts):
    return np.full((model.n_layers, model.n_heads), np.nan)

def shape(model, prompts):
    return np.ones((2, 2))

def nothing(model, prompts):
    return None

def boom(model, prompts):
    raise RuntimeError("no luck")

def lonely(model):
    return None

def edges(model, prompts):
    rows = [("L0H1", "L1H2", "q", 2.0), ("L0H1", "output", "", -3.0), ("input", "MLP 0", "", 1.0)]
    return pd.DataFrame(rows, columns=["sender", "receiver", "kind", "score"])

def strange(model, prompts):
    return edges(model, prompts).assign(sender="L7H7")

def columns(model, prompts):
    return edges(model, prompts)[["sender", "score"]]

def layer(model, prompts):
    return None

constant = 3
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(CODE)
    return path


def test_a_function_is_run_as_a_method(model: Any, file: Path) -> None:
    found = circuits.find(model, "ioi", f"{file}:ramp", n=4)
    np.testing.assert_array_equal(found.frame["ramp"], np.arange(32.0))
    assert found.column == "ramp" and str(found.heads(1)[0]) == "L3H7"
    settings = found.provenance["settings"]
    import hashlib

    assert settings["ramp.sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert any("not counted" in note for note in found.notes)
    before = found.provenance["fingerprint"]
    file.write_text(CODE + "\n# another\n")
    again = circuits.find(model, "ioi", f"{file}:ramp", n=4)
    assert again.provenance["fingerprint"] != before


def test_signed_scores_and_edges(model: Any, file: Path, tmp_path: Path) -> None:
    found = circuits.find(model, "ioi", f"{file}:signed", n=4)
    assert found.value("L0H3") == 2 and found.value("L1H0") == 1
    assert found.frame["signed_effect"].min() == -1
    assert any("ranked by their size" in note for note in found.notes)
    table = circuits.find(model, "ioi", f"{file}:edges", n=4)
    assert table.value("L0H1") == 3 and table.value("L2H2") == 0
    assert table.frame.query("layer == 0 and head == 1")["edges_effect"].item() == -1
    assert table.edges["score"].tolist() == [-3, 2, 1]
    said = written(tmp_path, table)
    assert said["edges"]["a0.h1->logits"] == dict(score=-3, in_graph=True)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("some", "gives L0H0 no score"),
        ("unknown", "L9H9, which the model has not"),
        ("words", "no number"),
        ("nan", "finite"),
        ("shape", r"\(2, 2\)"),
        ("nothing", "not scores|array"),
        ("boom", r"failed \(line \d+\): RuntimeError: no luck"),
        ("lonely", "takes \\(model\\)"),
        ("strange", "L7H7"),
        ("columns", "no column 'receiver'"),
        ("layer", "column of every table"),
        ("constant", "no function 'constant'"),
        ("absent", "it has ramp"),
    ],
)
def test_what_goes_wrong_is_told(model: Any, file: Path, name: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        circuits.find(model, "ioi", f"{file}:{name}", n=4)


def test_files_that_can_not_be_used(model: Any, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is none"):
        circuits.find(model, "ioi", f"{tmp_path}/absent.py:f", n=4)
    with pytest.raises(InputError, match="Name the function"):
        circuits.find(model, "ioi", str(file), n=4)
    with pytest.raises(InputError, match="no settings"):
        circuits.find(model, "ioi", f"{file}:ramp", n=4, mode="zero")
    with pytest.raises(HeadError):
        circuits.find(model, "ioi", f"{file}:no_head", n=4)
    file.write_text("def f(:\n")
    with pytest.raises(InputError, match=r"can't be run \(line 1\)"):
        circuits.find(model, "ioi", f"{file}:f", n=4)
    file.write_text("import not_there_at_all\n")
    with pytest.raises(InputError, match="ModuleNotFoundError"):
        circuits.find(model, "ioi", f"{file}:f", n=4)
    file.write_text("raise SystemExit(3)\n")
    with pytest.raises(InputError, match="SystemExit"):
        circuits.find(model, "ioi", f"{file}:f", n=4)
    assert torch.is_grad_enabled()


def test_on_the_command_line(file: Path, tmp_path: Path) -> None:
    run, graph = CliRunner().invoke, tmp_path / "graph.json"
    out = str(tmp_path / "out")
    done = run(app, ["circuit", "--method", f"{file}:ramp", "--n", "4", "--out", out,
                     "--export", str(graph)])  # fmt: skip
    assert done.exit_code == 0 and "L3H7" in done.stdout
    assert json.loads(graph.read_text())["nodes"]["a3.h7"]["score"] == 31
    failed = run(app, ["circuit", "--method", f"{file}:boom", "--n", "4", "--out", out + "2"])
    assert failed.exit_code == 2
