"""interp_vllm inside vLLM itself, against the same edits in transformers. Needs an environment with
vLLM (docs/how-to/serve-an-edit.md):

    INTERP_TEST_THREADS=1 pytest -n0 -m slow tests/serving/test_vllm.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import interp
from interp import edits as every
from interp.serving.check import _by_transformers
from interp.serving.settle import settled
from interp_vllm import HeadStatistics, asking

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TOKENS = 12
ALL = {"names": ["entropy", "first", "off_sink"], "groups": {"a": "1:5"}, "topk": 5}
QUICK = dict(dtype="float32", max_model_len=1024, max_num_seqs=16, seed=0)
#: log-probabilities and statistics are within these of transformers'
CLOSE, CLOSE_STATISTICS = 1e-4, 2e-4


def cases(layers: int = 30) -> dict[str, list[Any]]:
    """The edits, a case a request of one batch."""
    return {
        "none": [],
        "gains": [every.ScaleHeads({"L5H1": 0.0, "L18H6": 2.0})],
        "zero": [every.Ablate(["L2H3", "L7H0"])],
        "uniform": [every.Ablate(["L2H3", "L9H4"], mode="uniform")],
        "shift": [every.ShiftHeads({"L5H1": torch.linspace(-1, 1, 64)}, strength=2.0)],
        "initial": [every.ZeroTuning(0.5)],
        "initial, some": [every.ZeroTuning({"L4H0": 3.0, "L5H8": 0.1})],
        "hidden": [every.ScaleTokens((3, 9), 0.0)],
        "warm": [every.Temperature(1.2)],
        "growing": [every.Temperature(1.0, rule="ssa")],
        "several": [
            every.ScaleHeads({"L5H1": 0.5}, scope="decode"),
            every.ZeroTuning(2.0, queries=(5, 24)),
            every.Ablate(["L9H2"], queries=(3, None)),
        ],
    }


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = (20, 5, 300, 41, 130, 20, 1, 64, 33, 20, 27)
    return [torch.randint(100, 20000, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model() -> Any:
    return interp.load("smollm2-135m", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def folder(model: Any) -> str:
    from interp.loading import resolve

    return str(resolve("smollm2-135m").target)


@pytest.fixture(scope="module")
def wanted(model: Any) -> Any:
    """(case) → what transformers says."""

    @cache
    def of(name: str) -> Any:
        row = prompts()[list(cases()).index(name)]
        return _by_transformers(model, row, cases()[name], TOKENS)

    return of


def run(
    tmp_path: Path, model: str, rounds: list[Any], engine: dict[str, Any], **more: Any
) -> dict[str, Any]:
    job, out = tmp_path / "job.json", tmp_path / "out.json"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    environment |= more.pop("environment", {})
    asked = dict(model=model, rounds=rounds, engine=engine, tokens=TOKENS, **more)
    job.write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, str(HERE / "run_engine.py"), str(job), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def requests(statistics: Any = ALL) -> list[dict[str, Any]]:
    return [
        dict(prompt=prompt, extra=asking(edits, statistics))
        for prompt, edits in zip(prompts(), cases().values(), strict=True)
    ]


#: in this process, without the start of another; one thread, which other work disturbs least
ALONE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
MODES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "eager": (dict(enforce_eager=True, max_num_batched_tokens=256), ALONE),
    "compiled": (dict(max_num_batched_tokens=256), {}),
    "three ranks": (
        dict(enforce_eager=True, tensor_parallel_size=3, max_num_batched_tokens=256),
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0"},
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_mixed_edits_and_statistics_in_one_batch(
    mode: str, tmp_path: Path, folder: str, wanted: Any
) -> None:
    """Twice, the second time with all prompts in the prefix cache."""
    engine, environment = MODES[mode]
    engine = {**QUICK, **engine, "additional_config": {"interp": True}}
    found = run(tmp_path, folder, [requests()] * 2, engine, environment=environment)
    for answers in found["rounds"]:
        for name, answer in zip(cases(), answers, strict=True):
            assert answer["tokens"] == wanted(name).tokens, name
            far = [
                abs(a - b) for a, b in zip(answer["logprobs"], wanted(name).logprobs, strict=True)
            ]
            assert max(far) < CLOSE, (name, max(far))
            seen = HeadStatistics.from_json(answer["statistics"])
            assert len(seen.positions) == TOKENS
            for stat, value in wanted(name).statistics.items():
                gap = float((seen.values[stat] - value).abs().max())
                assert gap < CLOSE_STATISTICS, (name, stat, gap)
            both = seen.first + seen.off_sink
            torch.testing.assert_close(both, torch.ones_like(both), atol=1e-5, rtol=0)
            assert "Nothing is kept" in answer["taken twice"]


def test_edits_leave_nothing_in_the_prefix_cache(tmp_path: Path, folder: str, model: Any) -> None:
    """An unedited request after an edited one of the same prompt, and the other way round."""
    prompt = prompts()[2]
    edits = cases()["zero"]
    plain, edited = (_by_transformers(model, prompt, e, TOKENS) for e in ([], edits))
    order = [asking(edits), None, asking(edits), asking([], ["first"])]
    engine = {**QUICK, "enforce_eager": True, "additional_config": {"interp": True}}
    found = run(
        tmp_path,
        folder,
        [[dict(prompt=prompt, extra=extra)] for extra in order],
        engine,
        environment=ALONE,
    )
    assert plain.tokens != edited.tokens or abs(plain.logprobs[0] - edited.logprobs[0]) > 1e-2
    for (answer,), reading in zip(found["rounds"], (edited, plain, edited, plain), strict=True):
        assert answer["tokens"] == reading.tokens
        far = [abs(a - b) for a, b in zip(answer["logprobs"], reading.logprobs, strict=True)]
        assert max(far) < CLOSE


def test_requests_whose_pages_were_taken_away(tmp_path: Path, folder: str, wanted: Any) -> None:
    """Too few pages for all: some requests are computed again from their first token."""
    engine = {
        **QUICK,
        "max_model_len": 384,
        "enforce_eager": True,
        "num_gpu_blocks_override": 5,
        "disable_log_stats": False,
        "additional_config": {"interp": True},
    }
    names = ["gains", "several", "initial", "zero"]
    index = [list(cases()).index(name) for name in names]
    generator = torch.Generator().manual_seed(1)
    long = [torch.randint(100, 20000, (122,), generator=generator).tolist() for _ in index]
    asked = [
        dict(prompt=p, extra=asking(cases()[n], ALL)) for n, p in zip(names, long, strict=True)
    ]
    found = run(tmp_path, folder, [asked], engine, environment=ALONE, count_preemptions=True)
    hooked = interp.load("smollm2-135m", device="cpu", dtype="float32")
    assert found["preemptions"], "no request lost its pages"
    for name, prompt, answer in zip(names, long, found["rounds"][0], strict=True):
        reading = _by_transformers(hooked, prompt, cases()[name], TOKENS)
        assert answer["tokens"] == reading.tokens
        positions = answer["statistics"]["positions"]
        assert positions == list(range(121, 121 + TOKENS))


def test_a_mean_ablation_is_served_once_it_is_settled(
    tmp_path: Path, folder: str, model: Any
) -> None:
    edit = every.Ablate(["L5H1", "L20H3"], mode="mean", reference="ioi")
    row = prompts()[3]
    reading = _by_transformers(model, row, [edit], TOKENS)
    engine = {**QUICK, "enforce_eager": True, "additional_config": {"interp": True}}
    asked = [
        [dict(prompt=row, extra=asking(settled(model, edit)))],
        [dict(prompt=row, extra=asking(edit))],
    ]
    served, refused = run(tmp_path, folder, asked, engine, environment=ALONE)["rounds"]
    assert served[0]["tokens"] == reading.tokens
    far = [abs(a - b) for a, b in zip(served[0]["logprobs"], reading.logprobs, strict=True)]
    assert max(far) < CLOSE
    assert "settled" in refused[0]["error"]


def test_an_engine_that_was_not_started_for_it_refuses(tmp_path: Path, folder: str) -> None:
    row = prompts()[0]
    asked = [
        [dict(prompt=row, extra=None)],
        [dict(prompt=row, extra=asking(cases()["gains"]))],
        [dict(prompt=row, extra=None)],
    ]
    engine = {**QUICK, "enforce_eager": True}
    before, refused, after = run(tmp_path, folder, asked, engine, environment=ALONE)["rounds"]
    assert "additional_config" in refused[0]["error"]
    assert before == after


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (dict(kv_cache_dtype="fp8"), "quantised cache"),
        (
            dict(speculative_config=dict(method="ngram", num_speculative_tokens=2)),
            "speculative decoding",
        ),
        (dict(pipeline_parallel_size=2), "pipeline parallelism"),
    ],
)
def test_engines_that_are_not_served_do_not_start(
    tmp_path: Path, folder: str, engine: dict[str, Any], said: str
) -> None:
    settings = {**QUICK, "enforce_eager": True, "additional_config": {"interp": True}, **engine}
    with pytest.raises(AssertionError) as failed:
        run(tmp_path, folder, [], settings, environment=ALONE)
    assert said in str(failed.value)


PORT = 8791


@pytest.fixture(scope="module")
def server(folder: str) -> Iterator[str]:
    """vLLM's own server, with the route of statistics."""
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "interp",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", "served", "--port", str(PORT), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]
    command += ["--additional-config", '{"interp": true}']
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        address, until = f"http://127.0.0.1:{PORT}", time.monotonic() + 900
        try:
            while True:
                assert process.poll() is None and time.monotonic() < until, "it does not start"
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            yield address
        finally:
            process.terminate()


def post(address: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_over_http(server: str, wanted: Any) -> None:
    for name in ("none", "gains", "initial", "several"):
        body = dict(
            model="served",
            prompt=prompts()[list(cases()).index(name)],
            max_tokens=TOKENS,
            temperature=0,
            logprobs=1,
            ignore_eos=True,
            return_token_ids=True,
            vllm_xargs=asking(cases()[name], ALL),
        )
        status, answer = post(server, body)
        assert status == 200, answer
        choice, reading = answer["choices"][0], wanted(name)
        assert choice["token_ids"] == reading.tokens
        said = choice["logprobs"]["token_logprobs"]
        assert max(abs(a - b) for a, b in zip(said, reading.logprobs, strict=True)) < CLOSE
        from interp_vllm import ServingError, statistics

        seen = statistics(server, answer["id"])
        for stat, value in reading.statistics.items():
            assert float((seen.values[stat] - value).abs().max()) < CLOSE_STATISTICS
        with pytest.raises(ServingError, match="Nothing is kept"):
            statistics(server, answer["id"])


def test_a_text_of_the_prompt_over_http(server: str, model: Any) -> None:
    text = "The cat sat on the mat. The dog lay under the table. The cat sat on the"
    edits = [every.ScaleTokens(every.Span("The dog lay under"), 0.0)]
    row = model.tokenizer(text)["input_ids"]
    reading = _by_transformers(model, row, edits, TOKENS)
    body = dict(model="served", prompt=text, max_tokens=TOKENS, temperature=0, logprobs=1)
    body |= dict(ignore_eos=True, return_token_ids=True, vllm_xargs=asking(edits))
    _, answer = post(server, body)
    assert answer["choices"][0]["token_ids"] == reading.tokens
    body["vllm_xargs"] = asking([every.ScaleTokens(every.Span("no such text"), 0.0)])
    status, answer = post(server, body)
    assert status == 400 and "does not occur" in json.dumps(answer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('{"edits": [{"edit": "ablate", "heads": ["L99H0"]}]}', "no head L99H0"),
        ('{"edits": [{"edit": "act"}]}', "not served inside an engine"),
        ('{"edits": [{"edit": "zero_tuning", "gamma": -1}]}', "above 0"),
        ('{"statistics": ["everything"]}', "no statistic"),
        ("{", "not JSON"),
    ],
)
def test_what_is_not_served_is_a_bad_request(server: str, settings: str, said: str) -> None:
    body = dict(model="served", prompt="a", max_tokens=2, vllm_xargs={"interp": settings})
    status, answer = post(server, body)
    assert status == 400 and said in json.dumps(answer)
