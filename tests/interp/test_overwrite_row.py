"""OverwriteRow: against eager models whose row was overwritten, in every layout of padding and
heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from prompts import LENGTH, PADS, inputs_for, padded, tokens

from interp import edits as E
from interp.errors import EditError
from interp_hooks import HookedModel, hook
from interp_hooks.errors import HeadError

Tapped = Callable[[str], tuple[HookedModel, Any]]


@contextmanager
def overwritten(
    plain: Any, rows: dict[tuple[int, int, int], tuple[int, dict[int, float]]]
) -> Iterator[None]:
    """z[sample, query, head] of an eager model made from the values by hand: (layer, sample, head)
    → (query slot, {key slot: weight})."""
    values: dict[int, torch.Tensor] = {}

    def change(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def write(z: torch.Tensor) -> torch.Tensor:
            new = z.clone()
            for (at, sample, head), (query, weights) in rows.items():
                if at == layer:
                    new[sample, query, head] = sum(
                        w * values[layer][sample, head, k] for k, w in weights.items()
                    )
            return new

        return write

    with ExitStack() as stack:
        for layer in {at for at, _, _ in rows}:
            stack.enter_context(tiny.reading_values(plain, layer, values))
            stack.enter_context(tiny.rewriting_z(plain, layer, change(layer)))
        yield


@pytest.mark.parametrize("side", ["", "left", "right"], ids=["full", "left-padded", "right-padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_it_is_an_eager_model_whose_row_was_overwritten(
    tapped: Tapped, name: str, side: str
) -> None:
    """Positions count from the first real token; by default the row is the last real token's."""
    model, plain = tapped(name)
    ids, mask = tokens(), padded(side)
    first = [0, PADS[1] if side == "left" else 0]
    last = [LENGTH - 1, LENGTH - 1 - (PADS[1] if side == "right" else 0)]
    edits = [
        E.OverwriteRow("0.1, 0.2, 1.3", [[2, 4], [1, 3]], [[0.7, 0.2], [1.5, -1.0]]),
        E.OverwriteRow("1.0", [0, 3, 5], query=[7, 6]),
    ]
    rows: dict[tuple[int, int, int], tuple[int, dict[int, float]]] = {}
    for layer, head in ((0, 1), (0, 2), (1, 3)):
        rows[layer, 0, head] = last[0], {2: 0.7, 4: 0.2}
        rows[layer, 1, head] = last[1], {first[1] + 1: 1.5, first[1] + 3: -1.0}
    for sample, query in enumerate((7, 6)):
        rows[1, sample, 0] = first[sample] + query, {first[sample] + k: 1 / 3 for k in (0, 3, 5)}
    given = inputs_for(model, ids, mask)
    with torch.no_grad(), overwritten(plain, rows):
        wanted = plain(**given).logits
    with torch.no_grad(), model.edit(*edits):
        found = model(**given).logits
    with torch.no_grad():
        untouched = model(**given).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], wanted[real], atol=2e-4, rtol=2e-4)
    assert (
        float((found - untouched)[torch.arange(2), torch.tensor(last)].abs().min(0).values.max())
        > 1e-3
    )
    earlier = torch.arange(LENGTH) < 6  # of the first sample: no row before token 7 is touched
    torch.testing.assert_close(found[0, earlier], untouched[0, earlier], atol=1e-5, rtol=1e-5)


def test_transformer_lens_shows_the_overwritten_pattern() -> None:
    pytest.importorskip("transformer_lens")
    from prompts import hooked_transformer

    model = tiny.build("llama", seed=1)
    lens, ids = hook(hooked_transformer(model)), tokens()
    patterns: dict[int, torch.Tensor] = {}

    def keep(pattern: torch.Tensor, hook: Any) -> None:
        patterns[hook.layer()] = pattern.detach().clone()

    edit = E.OverwriteRow("0.3, 1.1", [[1, 3], [4, 4]], [0.75, 0.25])
    with (
        torch.no_grad(),
        lens.edit(edit),
        lens.module.hooks([(lambda n: n.endswith("hook_pattern"), keep)]),
    ):
        found = lens.logits(ids)
    for layer, head in ((0, 3), (1, 1)):
        wanted = torch.zeros(2, LENGTH)
        wanted[0, 1], wanted[0, 3], wanted[1, 4] = 0.75, 0.25, 1.0
        torch.testing.assert_close(patterns[layer][:, head, -1], wanted)
        assert float(patterns[layer][:, head, -2].max()) < 1.0  # the row before is the model's own
    hooked = hook(model)
    with torch.no_grad(), hooked.edit(edit):
        torch.testing.assert_close(found, hooked.logits(ids), atol=3e-4, rtol=3e-4)


def test_the_model_s_own_row_changes_nothing(tapped: Tapped) -> None:
    """A row overwritten with the weights it had."""
    model, plain = tapped("llama")
    ids = tokens()
    weights, logits = tiny.attentions(plain, input_ids=ids)
    edit = E.OverwriteRow("0.2", list(range(LENGTH)), weights[0][:, 2, -1])
    with torch.no_grad(), model.edit(edit):
        torch.testing.assert_close(model.logits(ids), logits, atol=1e-4, rtol=1e-4)


def test_only_the_prompt_s_row_when_generating(tapped: Tapped) -> None:
    """Decode steps see the model's own weights: generation is greedy decoding after an edited
    prompt."""
    model, _ = tapped("llama")
    ids = tokens()[:, :9]
    edit = E.OverwriteRow("0.0, 1.1", [[1], [2, 3]])
    with torch.no_grad():
        with model.edit(edit):
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=4,
                do_sample=False,
            )
            step = model(input_ids=ids, use_cache=True)
        made = [step.logits[:, -1].argmax(-1)]
        for _ in range(3):
            step = model(
                input_ids=made[-1][:, None], use_cache=True, past_key_values=step.past_key_values
            )
            made.append(step.logits[:, -1].argmax(-1))
    assert torch.equal(out[:, 9:], torch.stack(made, 1))


def test_beams_share_a_sample_s_keys(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    ids = tokens()
    with torch.no_grad(), model.edit(E.OverwriteRow("0.1, 1.0", [[1], [2, 3]])):
        alone = model.generate(input_ids=ids, max_new_tokens=3, num_beams=2)
        several = model.generate(
            input_ids=ids, max_new_tokens=3, num_beams=2, num_return_sequences=2
        )
        assert torch.equal(several[::2], alone)
        with pytest.raises(EditError, match="batch of 4"):  # four samples of one's own
            model.logits(ids.repeat_interleave(2, 0))


@pytest.mark.parametrize(
    "made",
    [
        E.OverwriteRow("0.1", [1, 2]),
        E.OverwriteRow(None, [[1], [2, 3]], [[1], [0.5, 0.25]]),
        E.OverwriteRow(
            "1.1, 0.2",
            torch.tensor([[1, 2], [3, 0]]),
            torch.tensor([0.5, 0.5]),
            torch.tensor([4, 3]),
        ),
        E.OverwriteRow("0.1", [3], [1.0], 5),
    ],
)
def test_to_json_and_back(made: E.OverwriteRow, tmp_path: Path) -> None:
    (back,) = E.from_json(made.to_json())
    assert back == made and back.to_json() == made.to_json()
    assert E.load(E.save(tmp_path / "row.json", [made])) == [made]


BAD: dict[str, Callable[[], Any]] = {
    "no keys": lambda: E.OverwriteRow("0.1", []),
    "no keys in one sample": lambda: E.OverwriteRow("0.1", [[1], []]),
    "a key below 0": lambda: E.OverwriteRow("0.1", [-1]),
    "half a key": lambda: E.OverwriteRow("0.1", [0.5]),
    "keys in words": lambda: E.OverwriteRow("0.1", "initial"),
    "numbers and lists": lambda: E.OverwriteRow("0.1", [1, [2]]),
    "weights not finite": lambda: E.OverwriteRow("0.1", [1, 2], [0.5, float("nan")]),
    "too few weights": lambda: E.OverwriteRow("0.1", [1, 2], [1.0]),
    "no weights": lambda: E.OverwriteRow("0.1", [1, 2], []),
    "too few in one sample": lambda: E.OverwriteRow("0.1", [[1, 2], [3]], [0.5, 0.5]),
    "weights of other samples": lambda: E.OverwriteRow("0.1", [[1], [2], [3]], [[1], [1]]),
    "query below 0": lambda: E.OverwriteRow("0.1", [1], query=-1),
    "query in words": lambda: E.OverwriteRow("0.1", [1], query="last"),
    "scope": lambda: E.OverwriteRow("0.1", [1], scope="decode"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_it_refuses(case: str) -> None:
    with pytest.raises(EditError) as error:
        BAD[case]()
    assert (
        "\n" not in str(error.value)
        and str(error.value).endswith(".")
        and len(str(error.value)) < 300
    )


IN_USE: dict[str, tuple[E.OverwriteRow, str]] = {
    "a key after the query": (E.OverwriteRow("0.1", [5], query=4), "causal"),
    "a key of the longer sample alone": (E.OverwriteRow("0.1", [LENGTH - 2]), "causal"),
    "a query beyond the shorter sample": (E.OverwriteRow("0.1", [1], query=LENGTH - 1), "shortest"),
    "keys of three samples": (E.OverwriteRow("0.1", [[1], [2], [3]]), "3 samples"),
    "a list that reads like one key a sample": (
        E.OverwriteRow("0.1", [1, 2]),
        "one list of 2 keys for 2 samples",
    ),
}


@pytest.mark.parametrize("case", IN_USE)
def test_what_it_refuses_in_use(tapped: Tapped, case: str) -> None:
    model, _ = tapped("llama")
    edit, match = IN_USE[case]
    with torch.no_grad(), pytest.raises(EditError, match=match), model.edit(edit):
        model(**inputs_for(model, tokens(), padded("left")))


def test_prompts_in_pieces_and_heads_that_are_not_there(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    ids = tokens()
    with torch.no_grad(), model.edit(E.OverwriteRow("0.1", [1])):
        out = model(input_ids=ids[:, :6], use_cache=True)
        with pytest.raises(EditError, match="one forward"):
            model(input_ids=ids[:, 6:], use_cache=True, past_key_values=out.past_key_values)
    with pytest.raises(HeadError), model.edit(E.OverwriteRow("0.9", [1])):
        pass


def test_it_explains_itself(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    text = model.explain(E.OverwriteRow("1.2, 1.3", [1]))
    assert "overwrite_row of heads 2, 3" in text
