"""ACT (Yu et al., ICML 2024): cut attention sinks down at prefill, and measure classification
before and after.

python examples/act.py                         # the bundled pocket-llama, offline, seconds
python examples/act.py --model meta-llama/Llama-3.1-8B --task lm_eval:sst2 --n 500
"""

from __future__ import annotations

import argparse

import torch

import interp
from interp.edits import ACT

EXPECT = """To expect on real models (published, means over nine classification data sets,
zero-shot):
  Llama-3.1-8B 59.59 → 60.11 (measured by the authors of ZeroTuning); at best +7.30 points,
Llama-30B.
Those numbers need the paper's head filter: heads kept one by one on held-out samples, layers 2 to
30 (184 heads of
Llama-2-7B for classification). Find yours with `interp calibrate` and pass them as --edit; without,
all heads act."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama", help="bundled name, alias, hub id or folder")
    parser.add_argument("--task", default="classification", help="a task, or lm_eval:NAME")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument(
        "--seed", type=int, default=1, help="of the problems; `interp calibrate` uses 0 if not told"
    )
    parser.add_argument("--edit", help="a JSON of edits, such as calibrated heads; else all heads")
    arguments = parser.parse_args()
    variants = {
        "paper (α = 5)": [ACT.preset("paper")],
        "code (threshold 0.1)": [ACT.preset("code")],
    }
    if arguments.edit:
        try:
            variants = {arguments.edit: interp.edits.load(arguments.edit)}
        except interp.InterpError as error:
            parser.exit(2, f"{error}\n")
    model = interp.load(arguments.model)
    print(model.note or model.name)

    # Where the sinks are: keys that receive more than 5/N of the attention, the first token left
    # out.
    tokens = interp.tasks.get("classification").sample(model.tokenizer, 1, seed=0)[0].ids
    with torch.no_grad(), model.observe("received") as seen:
        model(input_ids=torch.tensor([tokens]))
    share = torch.stack(
        [
            (seen[i].received[0, :, 1:] > 5 / len(tokens)).float().mean()
            for i in range(model.n_layers)
        ]
    )
    print("share of tokens that are sinks, by layer:", *(f"{s:.1%}" for s in share.tolist()))

    for name, edits in variants.items():
        result = interp.evaluate(model, arguments.task, edits, n=arguments.n, seed=arguments.seed)
        print(
            f"{arguments.task}, {name}: {result.baseline} → {result.edited}, McNemar "
            f"{result.mcnemar}"
        )
    print(EXPECT)


if __name__ == "__main__":
    main()
