"""What a request asks: read, refused, sent on, found in its prompt, and kept apart in the cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interp import edits as every
from interp.serving.entry import EditReader, register
from interp.serving.settle import settled
from interp_hooks.errors import InterpError
from interp_vllm import HeadStatistics, ServingError, asking
from interp_vllm.front import admitted, check_request
from interp_vllm.guards import check_config, check_layer, check_version
from interp_vllm.program import checked, of_rank
from interp_vllm.served import ServedModel
from interp_vllm.settings import Asked, Settings

MODEL = ServedModel("tiny", (0, 1, 2, 3), 8, 4, 32)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "an object with edits"),
        ({"edit": []}, "an object with edits"),
        ({"edits": [1]}, "a list of objects"),
        ({"statistics": ["everything"]}, "no statistic 'everything'"),
        ({"statistics": []}, "Name a statistic"),
        ({"statistics": ["groups"]}, "1 to 16 groups"),
        ({"statistics": {"groups": {"a": "9:5"}}}, "a span"),
        ({"statistics": {"names": ["first"], "cap": 0}}, "from 1 to"),
        ({"statistics": {"names": ["first"], "stage": "during"}}, "before or after"),
        ({"statistics": {"name": "first"}}, "not name"),
        ({"edits": [{"edit": "soft_pag", "u": 0.5}]}, "not served inside an engine"),
        ({"edits": [{"edit": "ablate", "heads": ["L4H0"]}]}, "no head L4H0"),
        ({"edits": [{"edit": "ablate", "heads": ["L0H8"]}]}, "no head L0H8"),
        ({"edits": [{"edit": "ablate", "mode": "mean", "reference": "ioi"}]}, "settled"),
        ({"edits": [{"edit": "ablate", "mode": "resample", "reference": "ioi"}]}, "resample"),
        ({"edits": [{"edit": "scale_tokens", "keys": "image", "gain": 2}]}, "image tokens"),
        ({"edits": [{"edit": "scale_tokens", "keys": "text:a", "gain": 2}]}, "no tokenizer"),
        ({"edits": [{"edit": "shift_heads", "directions": {"L0H0": [1.0]}}]}, "1 numbers"),
        ({"edits": [{"edit": "zero_tuning", "gamma": 0}]}, "above 0"),
        ({"edits": [{"gains": {}}]}, "needs its name"),
    ],
)
def test_what_is_not_served_is_said(value: Any, said: str) -> None:
    with pytest.raises(InterpError, match=said):
        admitted(value, MODEL, [1, 2, 3])


def test_statistics_are_read_as_they_are_written() -> None:
    for data in (["entropy"], {"groups": {"a": "1:4"}, "names": ["first"]}, {"topk": 3, "cap": 9}):
        one = Asked.read(data)
        assert Asked.read(one.to_json()) == one


def test_a_salt_for_each_edit_and_none_without() -> None:
    plain, statistics = Settings.read({}), Settings.read({"statistics": ["first"]})
    one, other = (
        checked(Settings.read(asking([every.ZeroTuning(g)])["interp"]), MODEL) for g in (2.0, 3.0)
    )
    again = checked(Settings.read({"edits": [{"edit": "zero_tuning", "gamma": 2.0}]}), MODEL)
    assert plain.salt is None and statistics.salt is None
    assert one.salt == again.salt != other.salt and one.salt is not None


def test_spellings_of_heads_are_one_salt() -> None:
    spelt = [{"edit": "ablate", "heads": h} for h in (["L1H2"], ["1.2"], [[1, 2]])]
    salts = {checked(Settings((entry,)), MODEL).salt for entry in spelt}
    assert len(salts) == 1


class Words:
    """A tokenizer of letters."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def test_a_text_becomes_its_positions() -> None:
    model = ServedModel("tiny", (0,), 8, 4, 32, Words())
    tokens = list(map(ord, "the cat saw the cat"))
    entry = {"edit": "scale_tokens", "keys": "text:cat", "gain": 0.0}
    found = admitted({"edits": [entry]}, model, tokens)
    assert found.edits[0]["keys"] == "16:19"  # the last place
    with pytest.raises(ServingError, match="does not occur"):
        admitted({"edits": [{**entry, "keys": "text:dog"}]}, model, tokens)


@pytest.mark.parametrize(
    ("edit", "kept"),
    [
        (every.ScaleHeads({"L0H1": 2.0, "L3H6": 3.0}), {"gains": {"L3H2": 3.0}}),
        (every.ZeroTuning({"L0H1": 2.0, "L3H4": 3.0}), {"gamma": {"L3H0": 3.0}}),
        (every.Ablate(["L2H3", "L2H5"]), {"heads": ["L2H1"]}),
        (every.ZeroTuning(2.0), {"gamma": 2.0, "heads": None}),
        (every.Ablate(["L2H3"]), None),
    ],
)
def test_a_rank_has_its_own_heads(edit: Any, kept: Any) -> None:
    local = of_rank(edit.to_json(), 4, 4)
    if kept is None:
        assert local is None
    else:
        assert local is not None and {k: local[k] for k in kept} == kept


def config(**changes: Any) -> Any:
    parallel = SimpleNamespace(
        pipeline_parallel_size=1, data_parallel_size=1, tensor_parallel_size=2, enable_dbo=False
    )
    made = SimpleNamespace(
        additional_config={"interp": True},
        use_v2_model_runner=False,
        compilation_config=SimpleNamespace(cudagraph_mode=None),
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(runner_type="generate"),
    )
    for name, value in changes.items():
        place, _, field = name.rpartition("__")
        setattr(getattr(made, place) if place else made, field, value)
    return made


def test_a_plain_engine_is_served() -> None:
    check_config(config())
    check_version("0.32.0")
    check_version("0.32.4.dev1+cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(use_v2_model_runner=True), "VLLM_USE_V2_MODEL_RUNNER=0"),
        (dict(speculative_config=object()), "speculative"),
        (dict(kv_transfer_config=object()), "another engine"),
        (dict(parallel_config__pipeline_parallel_size=2), "pipeline"),
        (dict(parallel_config__data_parallel_size=2), "data parallelism"),
        (dict(parallel_config__enable_dbo=True), "split in two"),
        (dict(cache_config__cache_dtype="fp8_e4m3"), "quantised"),
        (dict(model_config__runner_type="pooling"), "generate"),
        (
            dict(
                compilation_config__cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: True)
            ),
            "PIECEWISE",
        ),
    ],
)
def test_engines_that_would_be_silently_wrong_are_refused(changes: Any, said: str) -> None:
    with pytest.raises(ServingError, match=said):
        check_config(config(**changes))


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0"])
def test_versions_that_were_not_tested_are_refused(version: str) -> None:
    with pytest.raises(ServingError, match="was tested with"):
        check_version(version)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(sliding_window=128), "sliding window"),
        (dict(attn_type="encoder"), "encoder"),
        (dict(impl__logits_soft_cap=30.0), "soft-capped"),
        (dict(impl__sinks=torch.zeros(4)), "learned sinks"),
        (dict(impl__alibi_slopes=torch.zeros(4)), "ALiBi"),
        (dict(kv_sharing_target_layer_name="model.layers.0"), "another layer's cache"),
        (dict(head_size_v=16), "another width"),
    ],
)
def test_attention_of_another_kind_is_refused(changes: Any, said: str) -> None:
    impl = SimpleNamespace(do_kv_cache_update=lambda: None, logits_soft_cap=0, sinks=None)
    layer = SimpleNamespace(impl=impl, num_heads=4, head_size=8, head_size_v=8)
    check_layer("model.layers.0.attn", layer)
    for name, value in changes.items():
        place, _, field = name.rpartition("__")
        setattr(getattr(layer, place) if place else layer, field, value)
    with pytest.raises(ServingError, match=said):
        check_layer("model.layers.0.attn", layer)


def test_a_request_to_an_engine_that_was_not_started_for_it() -> None:
    params = SimpleNamespace(extra_args=asking([every.ZeroTuning(2.0)]), n=1)
    request = SimpleNamespace(sampling_params=params)
    processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    with pytest.raises(ServingError, match="additional_config"):
        check_request(processor, request)
    params.extra_args = None
    assert check_request(processor, request) is request


def test_a_mean_ablation_becomes_its_mean() -> None:
    import interp

    model = interp.load("llama", device="cpu")
    edit = every.Ablate(["L2H3", "L0H1"], mode="mean", reference="ioi", queries=(1, 6))
    ids = torch.arange(20, 30)[None]
    with model.edit(edit):
        wanted = model.logits(ids)
    with model.edit(*settled(model, edit)):
        got = model.logits(ids)
    assert float((wanted - model.logits(ids)).abs().max()) > 1e-3
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    checked(Settings.read(asking(settled(model, edit))["interp"]), MODEL)


def test_without_a_reader_a_sentence_says_so() -> None:
    from interp_vllm import reading

    settings = Settings.read({"edits": [{"edit": "scale_heads", "gains": {"L0H0": 0.0}}]})
    try:
        reading._USED.clear()
        with pytest.raises(ServingError, match="VLLM_PLUGINS must name interp"):
            checked(settings, MODEL)
    finally:
        reading.use(EditReader())
    checked(settings, MODEL)


def test_without_vllm_nothing_happens() -> None:
    register()
    register()


def test_copied_tokens_are_those_said_next() -> None:
    """A planted head that looks at what followed the last token like this one: induction."""
    prompt, said = [5, 6, 7, 8, 5], [6, 7, 9]
    top = torch.tensor([1, 2, 3]).view(3, 1, 1, 1)
    seen = HeadStatistics(torch.tensor([4, 5, 6]), 0, {"topk_index": top})
    assert seen.copied(prompt, said).flatten().tolist() == [True, True, False]
    assert seen.copied(prompt, said, span=(2, 5)).flatten().tolist() == [False, True, False]
    with pytest.raises(ServingError, match="nothing follows"):
        seen.copied(prompt, said[:2])
    with pytest.raises(AttributeError, match="they have topk_index"):
        _ = seen.entropy
