"""Recordings under `generate`: texts that end, samples that are repeated, drafts that are rejected.

The reference is eager attention over the text that each row turned out to be, read alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from prompts import LENGTH, left_padded, tokens

from interp.edits import ScaleHeads
from interp_hooks import HookedModel
from interp_hooks.errors import TapError
from interp_kernels import Received

Tapped = Callable[[str], tuple[HookedModel, Any]]
NEW = 8
PLAIN = dict(do_sample=False, pad_token_id=0)


@pytest.fixture
def llama(tapped: Tapped) -> tuple[HookedModel, Any]:
    return tapped("llama")


def entropy(plain: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """(heads, tokens) of one text, read alone."""
    a = plain(input_ids=ids[None], output_attentions=True).attentions[layer].double()
    return torch.special.entr(a).sum(-1)[0]


def ending(plain: Any, after: int, **inputs: Any) -> int:
    """A token that the first text of a batch, and no other, is given as its new token `after`."""
    free = plain.generate(**inputs, max_new_tokens=NEW, eos_token_id=None, **PLAIN)[:, LENGTH:]
    token = int(free[0, after])
    assert token not in free[0, :after].tolist() and token not in free[1].tolist()
    return token


class AfterThree(hf.StoppingCriteria):
    """Ends the first text of a batch after three new tokens."""

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        ended = torch.zeros(len(ids), dtype=torch.bool)
        ended[0] = ids.shape[1] >= LENGTH + 3
        return ended


def endings(plain: Any, given: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    return {
        "one id": dict(eos_token_id=ending(plain, 2, **given)),
        "several ids": dict(eos_token_id=[1, ending(plain, 2, **given)]),
        "padding is the id": dict(
            eos_token_id=(token := ending(plain, 2, **given)), pad_token_id=token
        ),
        "a criterion": dict(stopping_criteria=[AfterThree()], eos_token_id=None),
    }


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("how", ["one id", "several ids", "padding is the id", "a criterion"])
@torch.no_grad()
def test_rows_after_the_end_are_not_real(llama: Any, how: str, cache: bool) -> None:
    model, plain = llama
    mask = left_padded(True)
    given = dict(input_ids=tokens(), attention_mask=mask)
    more = {**PLAIN, **endings(plain, given)[how], "max_new_tokens": NEW, "use_cache": cache}
    chosen = torch.zeros(2, LENGTH + NEW, dtype=torch.bool)
    chosen[:, LENGTH:] = True  # generated rows
    with model.observe("entropy", "received", received={"new": Received(chosen)}) as seen:
        out = model.generate(**given, **more)
    rows = seen[1].queries
    if not cache:  # each step reads the whole text again
        last = rows[:, -(LENGTH + NEW - 1) :]
        assert bool(last[1, 5:].all()) and not last[1, :5].any()
        assert last[0].tolist() == [True] * (LENGTH + 2) + [False] * (NEW - 3)
        return
    # the last new token is never read: two rows of the first text, all but one of the second
    assert rows[0].tolist() == [True] * (LENGTH + 2) + [False] * (NEW - 3)
    assert rows[1].tolist() == [False] * 5 + [True] * (LENGTH + NEW - 6)
    with model.observe("entropy", reduce="mean") as mean:
        model.generate(**given, **more)
    with model.observe("entropy", reduce="histogram") as counts:
        model.generate(**given, **more)
    for layer in range(2):
        for row, text in enumerate((out[0, : LENGTH + 2], out[1, 5 : LENGTH + NEW - 1])):
            wanted = entropy(plain, text, layer)
            found = seen[layer].entropy[row][:, rows[row]]
            torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(
                mean[layer].entropy[row].double(), wanted.mean(-1), atol=2e-4, rtol=1e-3
            )
            assert counts[layer].entropy[row].sum(-1).tolist() == [len(text)] * 4
            a = plain(input_ids=text[None], output_attentions=True).attentions[layer][0]
            first, key = len(text) - (2 if row == 0 else NEW - 1), 3
            slot = key + (5 if row else 0)
            torch.testing.assert_close(
                seen[layer].received_by("new")[row, :, slot],
                a[:, first:, key].mean(-1),
                atol=2e-4,
                rtol=1e-3,
            )


@torch.no_grad()
def test_encoder_decoder_texts_end_too() -> None:
    torch.manual_seed(1)
    sizes = dict(encoder_layers=2, decoder_layers=2, init_std=0.5, pad_token_id=0)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    config = hf.BartConfig(vocab_size=101, d_model=32, forced_eos_token_id=None, **sizes, **heads)
    module = hf.BartForConditionalGeneration(config).eval()
    from interp_hooks import hook

    model = hook(module)
    criterion = [lambda ids, scores, **more: torch.tensor([ids.shape[1] >= 4, False])]
    mask = left_padded(True)
    with model.observe("entropy") as seen:
        model.generate(
            input_ids=tokens(),
            attention_mask=mask,
            stopping_criteria=criterion,
            max_new_tokens=NEW,
            **PLAIN | dict(eos_token_id=None),
        )
    real = [True] * 3 + [False] * (NEW - 3)  # the start token and two of three new ones
    for record in (seen[0], seen["cross", 1]):
        assert record.queries[0].tolist() == real
        assert bool(record.queries[1].all())
    assert torch.equal(seen["encoder", 0].queries, mask.bool())


@pytest.mark.parametrize(
    "how",
    [
        dict(num_beams=3, do_sample=False),
        dict(num_beams=2, num_return_sequences=2, do_sample=False),
        dict(num_return_sequences=3, do_sample=True),
        dict(num_beams=2, do_sample=True),
    ],
    ids=["beams", "beams-returned", "sampled", "beams-sampled"],
)
@torch.no_grad()
def test_what_is_asked_of_a_sample_is_asked_of_its_copies(llama: Any, how: dict) -> None:
    model, plain = llama
    mask = left_padded(True)
    given = dict(input_ids=tokens(), attention_mask=mask, position_ids=tiny.positions(mask))
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, 3, (2, LENGTH), generator=draw)
    pairs = torch.randint(5, LENGTH, (2, LENGTH, 1), generator=draw)
    chosen = torch.rand(2, LENGTH, generator=draw) < 0.6
    ask: Any = dict(labels=labels, pairs={"p": pairs}, received={"some": Received(chosen)})
    with model.observe("group_mass", "pair_mass", **ask) as seen:
        model.generate(
            **{k: v for k, v in given.items() if k != "position_ids"},
            **how,
            max_new_tokens=4,
            eos_token_id=None,
            pad_token_id=0,
        )
    copies = seen[0].queries.shape[0] // 2
    assert copies == max(how.get("num_beams", 1), how.get("num_return_sequences", 1))
    weights, _ = tiny.attentions(plain, **given)
    for layer, a in enumerate(weights):
        a = a * tiny.visible(mask, None)
        masses = torch.stack([(a * (labels == g)[:, None, None]).sum(-1) for g in range(3)], -1)
        own = a.gather(-1, pairs[:, None].expand(-1, 4, -1, -1))[..., 0]
        own = own * mask[:, None]
        found = seen[layer]
        for one, other in ((found.group_mass, masses), (found.pair_mass["p"], own)):
            torch.testing.assert_close(
                one[:, :, :LENGTH].double(),
                other.repeat_interleave(copies, 0),
                atol=2e-4,
                rtol=1e-3,
            )
        weight = (tiny.visible(mask, None) & chosen[:, None, :, None]).double()
        mean = (a * weight).sum(2) / weight.sum(2).clamp_min(1)
        torch.testing.assert_close(
            found.received_by("some")[..., :LENGTH].double(),
            mean.repeat_interleave(copies, 0),
            atol=2e-4,
            rtol=1e-3,
        )


@torch.no_grad()
def test_rows_of_beams_are_found_by_beam_indices(llama: Any) -> None:
    """A step's row belongs to the text that stood in that beam then; `beam_indices` says in which
    the returned text stood."""
    model, plain = llama
    with model.observe("entropy") as seen:
        out = model.generate(
            input_ids=tokens(),
            num_beams=3,
            do_sample=False,
            max_new_tokens=5,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    for sample, (text, beams) in enumerate(zip(out.sequences, out.beam_indices, strict=True)):
        for layer in range(2):
            wanted = entropy(plain, text[:-1], layer)
            steps = [
                seen[layer].entropy[int(beam), :, LENGTH + i]
                for i, beam in enumerate(beams[1 : len(text) - LENGTH])
            ]
            torch.testing.assert_close(
                torch.stack(steps, -1).double(), wanted[:, LENGTH:], atol=2e-4, rtol=1e-3
            )
            prompt = seen[layer].entropy[sample * 3, :, :LENGTH]
            torch.testing.assert_close(prompt.double(), wanted[:, :LENGTH], atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_sample_whose_search_is_over(llama: Any) -> None:
    """Beams of a sample that has all its texts go on beside the others and are not real."""
    model, plain = llama
    how = dict(num_beams=2, do_sample=False, early_stopping=True, max_new_tokens=10)
    free = plain.generate(tokens(), **how, eos_token_id=None, pad_token_id=0)
    token = int(free[0, LENGTH + 1])
    with model.observe("entropy") as seen:
        model.generate(input_ids=tokens(), **how, eos_token_id=token, pad_token_id=0)
    rows = seen[0].queries
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3])
    for row in rows:  # real rows, then rows after the end
        assert row.tolist() == sorted(row.tolist(), reverse=True)
    assert bool(rows[:, : LENGTH + 1].all())


@torch.no_grad()
def test_assisted_decoding_is_edited_and_not_recorded(llama: Any, tapped: Tapped) -> None:
    model, plain = llama
    ids = tokens(batch=1).repeat(1, 2)
    edit = ScaleHeads({"0.1": 0.0})
    keep = torch.ones(4, 1)
    keep[1] = 0
    how = dict(max_new_tokens=NEW, eos_token_id=None, **PLAIN)
    with tiny.rewriting_z(plain, 0, lambda z: z * keep):
        wanted = plain.generate(ids, **how)
    assistant = tiny.build("llama", seed=1)
    for draft in (dict(assistant_model=assistant), dict(prompt_lookup_num_tokens=3)):
        with model.edit(edit):
            assert torch.equal(model.generate(input_ids=ids, **how, **draft), wanted)
        with model.observe("entropy"), pytest.raises(TapError, match="Assisted"):
            model.generate(input_ids=ids, **how, **draft)
    with model.observe("entropy") as seen:  # and the block is as good as new
        model.generate(input_ids=ids, **how)
    assert seen[0].entropy.shape[-1] == ids.shape[1] + NEW - 1


@torch.no_grad()
def test_a_loop_that_goes_back_is_refused(llama: Any) -> None:
    model, _ = llama

    def loop(model: Any, input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        out = model(input_ids=input_ids, use_cache=True)
        model(input_ids=input_ids[:, :3], past_key_values=out.past_key_values)
        out.past_key_values.crop(-3)
        model(input_ids=input_ids[:, :1], past_key_values=out.past_key_values)
        return input_ids

    model.generate(input_ids=tokens(), custom_generate=loop)
    with model.edit(ScaleHeads({"0.1": 0.0})):
        model.generate(input_ids=tokens(), custom_generate=loop)
    with model.observe("entropy"), pytest.raises(TapError, match="goes back"):
        model.generate(input_ids=tokens(), custom_generate=loop)


@torch.no_grad()
def test_reference_runs_between_steps_leave_no_trace(llama: Any) -> None:
    """`clean` inside generate: its forwards are none of the texts'."""
    model, plain = llama
    given = dict(input_ids=tokens(), attention_mask=left_padded(True))
    token = ending(plain, 2, **given)

    def refer(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with model.clean():
            model(input_ids=tokens(7, batch=2, length=5))
        return scores

    how = dict(max_new_tokens=NEW, eos_token_id=token, **PLAIN)
    with model.observe("entropy") as seen:
        model.generate(**given, **how)
    with model.observe("entropy") as beside:
        model.generate(**given, **how, logits_processor=[refer])
    assert torch.equal(seen[0].queries, beside[0].queries)
    assert torch.equal(seen[1].entropy, beside[1].entropy)


@torch.no_grad()
def test_batches_that_do_not_fit_are_refused(llama: Any) -> None:
    model, _ = llama
    labels = torch.zeros(2, LENGTH, dtype=torch.long)
    four = tokens(batch=4)
    ask = model.observe("group_mass", labels=labels)
    with pytest.raises(TapError, match="labels is for 2 samples"), ask:
        model(input_ids=four)
    pairs = {"p": torch.zeros(2, LENGTH, 1, dtype=torch.long)}
    with pytest.raises(TapError, match="pairs"), model.observe("pair_mass", pairs=pairs):
        model(input_ids=four)
    sets = {"s": Received(torch.ones(2, LENGTH, dtype=torch.bool))}
    with pytest.raises(TapError, match="received"), model.observe("max", received=sets):
        model(input_ids=four)
    for reduce in ("none", "mean", "histogram"):
        with pytest.raises(TapError, match="batch size"), model.observe("max", reduce=reduce):
            model(input_ids=four)
            model(input_ids=four[:1])
    with model.observe("received") as seen:  # a longer text first
        model(input_ids=four)
        model(input_ids=four[:, :6])
    assert seen[0].received.shape == (4, 4, LENGTH)
