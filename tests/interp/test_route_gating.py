"""Route gating against the two routes of each head as an untouched eager model has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from seeing import NEW, alone, llava, prompts
from test_vision_edits import IMAGE

from interp.errors import InputError
from interp.procedures import RouteGating


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def gated_logits(
    twin: Any, given: dict[str, torch.Tensor], new: list[int], own: list[torch.Tensor], lam: float
) -> torch.Tensor:
    """(vocabulary,) of a text whose steps were all gated, the last of them for the best token of
    own[-1]. z_vis of a layer is what W_O gets when that layer's values are 0 but for the image;
    weights do not read values. Layers are gated one after the other, in rows of the steps so
    far."""
    ids = torch.cat([given["input_ids"], torch.tensor([new], dtype=torch.int64)], 1)
    image = ids[0] == IMAGE
    text = twin.model.language_model
    steps = range(given["input_ids"].shape[1] - 1, ids.shape[1])  # rows that predict
    gates: dict[int, torch.Tensor] = {}  # layer → what is put in place of z in these rows
    logits = torch.empty(0)
    for layer in [*range(len(text.layers)), None]:
        captured: dict[str, torch.Tensor] = {}
        for part in ("whole", "vision"):
            handles = []
            for n, block in enumerate(text.layers):
                attn = block.self_attn

                kept = captured if n == layer else {}

                def put(_m: Any, args: Any, n: int = n, part: str = part, kept: Any = kept) -> Any:
                    z = args[0].clone()
                    kept[part] = z[0, list(steps)].clone()
                    if n in gates:
                        z[0, list(steps)] = gates[n]
                    return (z,)

                handles.append(attn.o_proj.register_forward_pre_hook(put))
                if part == "vision" and n == layer:
                    handles.append(
                        attn.v_proj.register_forward_hook(
                            lambda _m, _a, v: v * image[None, :, None].to(v)
                        )
                    )
            logits = twin(input_ids=ids, pixel_values=given["pixel_values"]).logits[0]
            for handle in handles:
                handle.remove()
        if layer is None:
            break
        attn = text.layers[layer].self_attn
        d = attn.head_dim
        W_O = attn.o_proj.weight.double()  # (d_model, heads · d)
        rows = []
        for k, _ in enumerate(steps):
            u = twin.lm_head.weight[int(own[k].argmax())].double()
            z, v = captured["whole"][k].double(), captured["vision"][k].double()
            made = z.clone()
            for h in range(len(z) // d):
                at = slice(h * d, (h + 1) * d)
                e_vis, e_text = (float(x[at] @ (W_O[:, at].T @ u)) for x in (v, z - v))
                if e_vis * e_text < 0 and abs(e_vis) < abs(e_text):
                    made[at] = v[at] + lam * (z - v)[at]
            rows.append(made.float())
        gates[layer] = torch.stack(rows)
    return logits[-1]


def test_route_gating_is_a_second_prediction_with_text_turned_down() -> None:
    model, twin = llava()
    inputs = alone(prompts(), 1)
    gating = RouteGating(model, inputs, scale=0.25)
    out = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        logits_processor=[gating],
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    own = [step[0] for step in out.logits]
    changed = False
    for k, scores in enumerate(out.scores):
        wanted = gated_logits(twin, inputs, new[:k], own[: k + 1], 0.25)
        torch.testing.assert_close(scores[0], wanted, atol=1e-3, rtol=1e-3)
        changed |= not torch.allclose(own[k], wanted, atol=1e-2)
    assert changed


def test_nothing_is_gated_at_lambda_1_and_bad_numbers_are_refused() -> None:
    model, _ = llava()
    inputs = prompts()
    how: Any = dict(max_new_tokens=4, do_sample=False)
    plain = model.generate(**inputs, **how)
    same = model.generate(**inputs, **how, logits_processor=[RouteGating(model, inputs, scale=1.0)])
    assert torch.equal(plain, same)
    for bad in (dict(scale=1.5), dict(scale=-0.1)):
        with pytest.raises(InputError):
            RouteGating(model, inputs, **bad)
    gating = RouteGating(model, inputs)
    with pytest.raises(InputError, match="beams"):
        model.generate(**inputs, **how, logits_processor=[gating], num_beams=2)
