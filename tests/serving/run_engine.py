"""Runs a job in vLLM and writes what came out: a process of its own for each engine.

    python run_engine.py JOB.json OUT.json

A job: `model`, settings of `vllm.LLM` in `engine`, and `rounds`, each a list of requests {prompt,
extra} that run as one batch. Out: for each round, for each request, `tokens`, `logprobs`, the
statistics as a server hands them out where any were asked for, and `error` in place of all where
the round was refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answer(llm: Any, output: Any, extra: dict[str, Any] | None) -> dict[str, Any]:
    from interp_vllm import ServingError, statistics

    said = output.outputs[0]
    found = {
        "tokens": list(said.token_ids),
        "logprobs": [one[t].logprob for one, t in zip(said.logprobs, said.token_ids, strict=True)],
    }
    if extra and "statistics" in extra["interp"]:
        found["statistics"] = statistics(llm, output.request_id).to_json()
        try:
            statistics(llm, output.request_id)
        except ServingError as error:
            found["taken twice"] = str(error)
    return found


def main(job: Path, out: Path) -> None:
    from vllm import LLM, SamplingParams

    asked = json.loads(job.read_text())
    llm, rounds = LLM(asked["model"], **asked["engine"]), []
    for requests in asked["rounds"]:
        params = [
            SamplingParams(
                max_tokens=asked["tokens"],
                temperature=0,
                logprobs=1,
                ignore_eos=True,
                extra_args=one["extra"],
            )
            for one in requests
        ]
        prompts = [{"prompt_token_ids": one["prompt"]} for one in requests]
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            rounds.append([{"error": str(error)}])
            continue
        rounds.append([answer(llm, o, r["extra"]) for o, r in zip(outputs, requests, strict=True)])
    preempted = None
    if asked.get("count_preemptions"):
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
        preempted = metrics.get("vllm:num_preemptions")
    out.write_text(json.dumps({"rounds": rounds, "preemptions": preempted}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
