"""Is every kernel right on this GPU? Each against the float64 definition at odd shapes, within a
minute.

    python kernels/benchmarks/first_smoke.py [--workers 8] [--seconds 60] [--only WORDS] [--again]

Prompts off multiples of 128, static and dynamic caches, decode steps, head dimensions that are no
power of two, three types, statistics, edits, one CUDA graph and one generation under the tap. Most
of the time is compilation, so several processes share the cases. A line of JSON is written as each
is done (`first_smoke.jsonl` in $OUT, else in results/); what is right already with these sources is
not run again. Exits 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import record
import torch

from interp_kernels import Mask, Received, Request, Rule, Steer, attention, explain
from interp_kernels.fused import configs

Tensor = torch.Tensor
Check = Callable[[torch.device], str]

ACT = Rule(torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0]]))
ROWS = frozenset({"entropy", "max", "argmax", "distance", "capped_distance", "group_mass"})


def tensors(
    device: torch.device, lq: int, lk: int, d: int, dtype: torch.dtype, d_v: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(lq + lk + d)
    shapes = ((4, lq, d), (2, lk, d), (2, lk, d_v or d))
    return [
        torch.randn(1, n, h, size, generator=generator).to(device, dtype).transpose(1, 2)
        for h, n, size in shapes
    ]


def moved(value: Any, device: torch.device, wide: bool = False) -> Any:
    """A request, edit or mask with its tensors on the device, those of floats in float64."""
    if isinstance(value, Tensor):
        if wide and value.is_floating_point():
            value = value.double().masked_fill(value == torch.finfo(value.dtype).min, -math.inf)
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(one, device, wide) for name, one in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        fields = {name: moved(getattr(value, name), device, wide) for name in vars(value)}
        return type(value)(**fields)
    return value


def against(
    lq: int, lk: int, d: int, dtype: torch.dtype = torch.bfloat16, d_v: int = 0, **settings: Any
) -> Check:
    """The kernels' answer beside the definition's; the route it took."""

    def check(device: torch.device) -> str:
        q, k, v = tensors(device, lq, lk, d, dtype, d_v)
        given = moved(settings, device)
        line = explain(q, k, v, backend="triton", **given)
        got = attention(q, k, v, backend="triton", **given)
        wide = moved(settings, device, wide=True)
        want = attention(q.double(), k.double(), v.double(), backend="reference", **wide)
        fine = dtype == torch.float32
        near(got.out, want.out, 2e-4 if fine else 2e-2, "out")
        near(got.lse, want.lse, 1e-3 if fine else 5e-3, "lse")
        for name, value in want.stats.items():
            if name in ("argmax", "topk_index"):  # ties may fall either way
                same = (got.stats[name] == value).double().mean()
                if not same > 0.98:
                    raise AssertionError(f"{name}: {float(1 - same):.1%} differ")
            else:
                bound = 0.1 if "distance" in name else 5e-3
                near(got.stats[name], value, bound, name)
        return line

    return check


def near(got: Tensor, want: Tensor, bound: float, name: str) -> None:
    got = got.double()
    if not torch.equal(got.isfinite(), want.isfinite()):
        raise AssertionError(f"{name}: infinities or NaN differ")
    shown = want.isfinite()
    off = ((got - want).abs() / (1 + want.abs()))[shown]
    worst = float(off.max()) if off.numel() else 0.0
    if not worst <= bound:
        raise AssertionError(f"{name}: off by {worst:.3g}, allowed {bound}")


def specialised(d: int) -> Check:
    """The warp-specialised forward, which the table does not name before it is known to be right
    here."""
    few = Request(frozenset({"entropy", "max", "argmax"}))
    mask = Mask(q_start=88)

    def check(device: torch.device) -> str:
        if device.type == "cuda" and configs.family(device) != 90:
            return "skipped: no Hopper"
        for config in configs.SPECIALISED:
            with patch.object(configs, "forward", lambda *_, one=config: one):
                line = against(301, 389, d, mask=mask, request=few)(device)
        return line

    return check


def cuda_graph(device: torch.device) -> str:
    """A captured pass with statistics and an edit, replayed on other data."""
    if device.type != "cuda":
        return "skipped: no CUDA device"
    q, k, v = tensors(device, 517, 517, 128, torch.bfloat16)
    request = Request(frozenset({"entropy"}), received={"all": Received()})
    steer = moved(Steer(labels=(torch.arange(517) % 9 == 0).long()[None, None], rule=ACT), device)

    def run() -> list[Tensor]:
        seen = attention(q, k, v, request=request, backend="triton")
        edited = attention(q, k, v, steer=steer, backend="triton")
        return [seen.out, seen.stats["entropy"], seen.stats["received:all"], edited.out]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    q.copy_(q.flip(2))
    want = [one.clone() for one in run()]
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(made, want, strict=True):
        near(got, expected.double(), 1e-3, "replayed")
    return "captured and replayed"


def generation(device: torch.device) -> str:
    """A small Llama generates the same tokens watched as by eager attention, with either cache."""
    import transformers

    from interp_hooks import Question, hook

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to(device)  # float32: no near ties
    ids = torch.randint(0, 97, (1, 41), generator=torch.Generator().manual_seed(0)).to(device)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("eager")
    want = model.generate(ids, **options)
    model.set_attn_implementation("sdpa")
    for cache in ("dynamic", "static"):
        seen: list[Any] = []
        tapped = hook(model, name="smoke")
        with tapped.watch(Question(frozenset({"entropy"})), seen.append), torch.no_grad():
            extra = {} if cache == "dynamic" else dict(cache_implementation="static")
            got = tapped.module.generate(ids, **options, **extra, disable_compile=True)
        if not torch.equal(got, want):
            raise AssertionError(f"{cache} cache: other tokens than eager attention's")
        if not seen:
            raise AssertionError(f"{cache} cache: nothing was seen")
    return "the same tokens"


def cases() -> dict[str, Check]:
    """name → check, what matters most first."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    labels = torch.arange(301)[None] % 5
    every = Request(ROWS, labels, 5, received={"all": Received()}, topk=2)
    pads = Mask(keys=(torch.arange(301) >= 33)[None])
    bias = torch.randn(1, 4, 301, generator=torch.Generator().manual_seed(0))
    bias[..., ::7] = -math.inf
    spans = Steer(spans=((0, 1, 1), (40, 190, 1)), rule=ACT)
    lists = Steer(labels=(torch.arange(301) % 9 == 0).long()[None, None], rule=ACT)
    made: dict[str, Check] = {
        "plain 301": against(301, 301, 128),
        "static cache 301 of 640": against(301, 640, 128),
        "static cache, later": against(301, 900, 128, mask=Mask(q_start=250)),
        "dynamic cache": against(133, 389, 128, mask=Mask(q_start=256)),
        "full": against(133, 389, 128, mask=Mask(causal=False)),
        "statistics": against(301, 301, 128, request=every),
        "warps specialised": specialised(128),
        "warps specialised, 64": specialised(64),
        "decode": against(1, 901, 128, mask=Mask(q_start=900)),
        "decode, static cache": against(
            1, 901, 128, mask=Mask(q_start=700), request=Request(topk=5)
        ),
        "one CUDA graph": cuda_graph,
        "one generation": generation,
        "spans": against(301, 301, 128, steer=spans),
        "scattered keys": against(301, 301, 128, steer=lists),
        "decode of 5 rows under a rule": against(
            5, 301, 128, mask=Mask(q_start=296), steer=lists
        ),
        "padding": against(301, 301, 128, mask=pads),
        "window": against(301, 301, 128, mask=Mask(window=70), request=Request(ROWS, labels, 5)),
        "half bias that hides": against(
            301, 301, 128, fp16, steer=Steer(bias=bias.half()),
            request=Request(frozenset({"entropy"})),
        ),
        "soft-cap and sinks": against(301, 301, 128, softcap=20.0, sinks=torch.ones(4)),
        "temper and gain": against(
            301, 301, 128,
            steer=Steer(temper=torch.full((1, 4, 301), 0.7), gain=torch.ones(1, 4, 1) / 2),
        ),
        "sigmoid": against(301, 301, 128, steer=Steer(sigmoid=-3.0)),
        "blend": against(301, 301, 128, steer=Steer(blend=torch.full((4,), 0.3))),
        "column questions": against(
            301, 301, 128,
            request=Request(
                received={
                    "set": Received((torch.arange(301) % 3 == 0)[None], reduce="sum"),
                    "band": Received(band=(1, 50), reduce="max"),
                    "keys": Received(keys=torch.arange(0, 300, 11)[None, None]),
                }
            ),
        ),
    }  # fmt: skip
    flags = torch.rand(1, 1, 301, 301, generator=torch.Generator().manual_seed(1)) > 0.3
    few = Request(frozenset({"entropy"}), received={"all": Received()}, topk=3)
    made |= {
        "statistics after a rule": against(301, 301, 128, steer=lists, request=every),
        "statistics after a rule over spans": against(301, 301, 128, steer=spans, request=every),
        "statistics after a blend": against(
            301, 301, 128, steer=Steer(blend=torch.full((4,), 0.3)), request=every
        ),
        "top-k of every row": against(301, 301, 128, request=Request(topk=20)),
        "top-k of chosen rows after a rule": against(
            301, 301, 128, steer=lists,
            request=Request(topk=3, topk_rows=torch.tensor([5, 77, 300])),
        ),
        "dense mask": against(301, 301, 128, mask=Mask(dense=flags), request=every),
        "dense bias": against(
            301, 301, 128, mask=Mask(dense=torch.zeros(1, 4, 301, 301).masked_fill(~flags, -1e38)),
            steer=lists, request=few,
        ),
        "kept keys": against(301, 301, 128, mask=Mask(window=70, keep_first=4), request=every),
        "kept keys after a rule": against(
            301, 301, 128, mask=Mask(window=70, keep_first=4), steer=lists, request=few
        ),
        "decode, kept keys": against(
            1, 901, 128, mask=Mask(q_start=900, window=70, keep_first=4), request=Request(topk=5)
        ),
        "decode, dense mask": against(
            3, 301, 128, mask=Mask(q_start=298, dense=flags[:, :, -3:]), steer=lists
        ),
    }  # fmt: skip
    for d in (64, 96, 192, 256, 512, 80):
        made[f"plain, D = {d}"] = against(301, 301, d)
        made[f"statistics, D = {d}"] = against(301, 301, d, request=every)
        made[f"after a rule, D = {d}"] = against(301, 301, d, steer=lists, request=few)
        made[f"decode, D = {d}"] = against(1, 517, d, mask=Mask(q_start=516))
    for dtype in (fp16, fp32):
        name = str(dtype).split(".")[1]
        made[f"plain, {name}"] = against(301, 301, 128, dtype)
        made[f"statistics, {name}"] = against(301, 301, 128, dtype, request=every)
        made[f"decode, {name}"] = against(1, 517, 128, dtype, mask=Mask(q_start=516))
    made["statistics, D = 64, values of 96"] = against(301, 301, 64, bf16, 96, request=every)
    return made


def done_before(path: Path, sources: str) -> set[str]:
    """Cases that were right with these sources."""
    if not path.is_file():
        return set()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {one["name"] for one in lines if one["ok"] and one["sources"] == sources}


def work(names: list[str], path: Path, sources: str, device: torch.device) -> None:
    """Run cases, a line each."""
    every = cases()
    for name in names:
        start, row = time.perf_counter(), dict(name=name, sources=sources)
        try:
            row |= dict(ok=True, note=every[name](device))
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            row |= dict(ok=False, error=text[:400])
        row |= dict(seconds=round(time.perf_counter() - start, 2), gpu=record.slug(device))
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{'ok   ' if row['ok'] else 'WRONG'} {name}: {row.get('note') or row.get('error')}")
        sys.stdout.flush()
        if not row["ok"]:
            record.tidy()  # ends this process if the device is lost for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="", help="only cases that contain these words")
    parser.add_argument("--again", action="store_true", help="run also what was right already")
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else record.RESULTS
    path, sources = folder / "first_smoke.jsonl", record.digest(__file__)
    if arguments.names:
        work(arguments.names, path, sources, device)
        return
    folder.mkdir(parents=True, exist_ok=True)
    right = set() if arguments.again else done_before(path, sources)
    words = arguments.only.split()
    todo = [n for n in cases() if n not in right and all(word in n for word in words)]
    limit = time.monotonic() + arguments.seconds
    shares = [todo[i :: arguments.workers] for i in range(arguments.workers)]
    workers = [
        subprocess.Popen([sys.executable, __file__, "--names", *share]) for share in shares if share
    ]
    for one in workers:
        try:
            one.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.terminate()
    right = done_before(path, sources)
    left = [name for name in todo if name not in right]
    print(f"{len(todo) - len(left)} of {len(todo)} right; {path}")
    if left:
        print("not right, or not reached: " + ", ".join(left))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
