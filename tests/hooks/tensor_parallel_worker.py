"""Run by torchrun in two processes (`test_tensor_parallel.py`): models whose heads are shared out,
beside the same models in one process. Prints, for each, the largest difference of each answer.

    torchrun --nproc-per-node 2 tensor_parallel_worker.py FOLDER llama qwen3 …
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import build
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import interp
from interp_hooks import HookedModel, WeightRows, hook
from interp_hooks.errors import InterpError, TapError
from interp_hooks.question import Question

IDS = (torch.arange(28).reshape(2, 14) * 37 + 11) % 101
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
STATISTICS = ("entropy", "max", "argmax", "distance", "key_mass", "value_norm", "group_mass")


def answers(model: HookedModel) -> dict[str, torch.Tensor]:
    """What a user may ask of a model, by name."""
    found: dict[str, Any] = {"logits": model.logits(IDS, MASK)}
    found["sizes"] = torch.tensor([model.n_layers, model.n_heads, model.n_kv_heads, model.d_head])
    labels = torch.arange(IDS.shape[1])[None].expand(2, -1) % 3
    with model.observe(*STATISTICS, "received", "topk", labels=labels, topk=2) as seen:
        model.logits(IDS, MASK)
    for name in (*STATISTICS, "received", "topk_prob"):
        found[name] = torch.cat([getattr(layer, name).flatten() for layer in seen])
    with model.capture_z() as z, model.capture_resid() as resid:
        model.logits(IDS, MASK)
    found["z"] = torch.stack(list(z.values()))
    found["stream"] = resid["post", 0]
    edits = interp.edits
    for edit in (
        edits.Ablate(["L0H3", "L1H0"]),
        edits.Ablate(["L0H3"], mode="uniform"),
        edits.ScaleHeads({"L1H2": 2.0}),
        edits.ZeroTuning(2.0),
        edits.Temperature(1.5),
        edits.ACT(),
    ):
        with model.edit(edit), model.observe("entropy", stage="after") as seen:
            found[f"under {edit}"] = model.logits(IDS, MASK)
        found[f"entropy under {edit}"] = seen[1].entropy
        with model.edit(edit):
            found[f"tokens under {edit}"] = model.generate(
                input_ids=IDS[:1], max_new_tokens=4, do_sample=False
            )
    with model.observe("entropy") as seen:
        model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
    found["decoding"] = seen[1].entropy
    rows: list[torch.Tensor] = []
    asked = Question(weights=WeightRows(lambda call, start, a: rows.append(a), (3,)))
    with model.watch(asked, lambda stats: None):
        model.logits(IDS, MASK)
    found["weights of a head"] = torch.cat([a.flatten() for a in rows])
    with model.observe("max"):
        attentions = model.module(IDS, output_attentions=True).attentions
    found["attentions"] = torch.stack(attentions)
    weights = model.head_weights(1)
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        try:
            found[name] = getattr(weights, name)
        except TapError:  # a norm of queries and keys, as in one process
            found[name] = torch.zeros(0)
    found["W_U"] = model.vocabulary().W_U

    def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor * torch.arange(tensor.shape[2])[:, None] if place == "q" else None

    with model.projections(write):
        found["projections written"] = model.logits(IDS, MASK)
    with torch.enable_grad(), model.activations("z", "q", "v", write=None) as kept:
        said = model.logits(IDS)
        wanted = [kept["z", 0], kept["z", 1], kept["q", 0], kept["v", 1]]
        for i, gradient in enumerate(torch.autograd.grad(said[0, -1, 5], wanted)):
            found[f"gradient {i}"] = gradient
    return found


def compared(family: str, folder: Path) -> dict[str, Any]:
    """The largest difference of each answer, relative to its size; or why the model is refused."""
    if dist.get_rank() == 0:
        build(family).save_pretrained(folder)
    dist.barrier()
    plan = DistributedConfig(tp_plan="auto")
    ours = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan).eval()
    try:
        got = answers(hook(ours))
    except InterpError as refused:
        return dict(refused=str(refused))
    want = answers(hook(AutoModelForCausalLM.from_pretrained(folder).eval()))
    apart = {}
    for name, value in want.items():
        assert got[name].shape == value.shape, (name, got[name].shape, value.shape)
        shown = value.double(), got[name].double()
        if value.numel():
            apart[name] = float((shown[0] - shown[1]).abs().max() / max(1, shown[0].abs().max()))
    heads = ours.model.layers[0].self_attn.o_proj.weight
    return dict(apart=apart, shared=isinstance(heads, DTensor))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    with torch.no_grad():
        for family in sys.argv[2:]:
            found = compared(family, folder / family)
            if dist.get_rank() == 0:
                print(json.dumps({family: found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
