"""What a model answers to a task's problems, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from interp.inputs.batches import fits
from interp.inputs.forward import forward
from interp.inputs.greedy import greedy
from interp.inputs.tokenizer import pad_id, stop_tokens
from interp.tasks.task import Batch, Instance, Task, collate
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel


def batches(instances: Sequence[Instance], pad: int) -> Iterator[Batch]:
    """Left-padded batches of similar lengths within the token budget, in order of the instances."""
    return (collate([instances[i] for i in group], pad) for group in grouped(instances))


def grouped(instances: Sequence[Instance]) -> Iterator[list[int]]:
    """Which instances stand in a batch together: similar lengths within the token budget, in
    order."""
    group: list[int] = []
    for i, instance in enumerate(instances):
        width = max(len(instances[k].ids) for k in [*group, i])
        far = group and len(instance.ids) > 2 * len(instances[group[0]].ids)
        if group and (far or not fits(width, len(group) + 1)):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@torch.no_grad()
def answer_logits(model: HookedModel, batch: Batch, stepwise: bool = False) -> list[torch.Tensor]:
    """(judged positions, vocabulary) float32 of each instance.

    `stepwise`, and always where a block of `model.caching` gives caches: prefill each prompt and
    feed the answer token by token through the cache, so that what a cache lets go is missed and
    edits with a prefill or decode scope act as they do in generation.
    """
    if (stepwise or model.gives_caches) and model.has_cache:
        return [_by_steps(model, instance) for instance in batch.instances]
    width = batch.input_ids.shape[1]
    first = min(
        p + o for i, o in zip(batch.instances, batch.offset, strict=True) for p in i.positions
    )
    out = forward(model, batch.input_ids, batch.attention_mask, keep=width - first)
    logits = logits_of(out)
    start = width - logits.shape[1]  # models without logits_to_keep return all rows
    return [
        logits[b, [p + offset - start for p in i.positions]].float().cpu()
        for b, (i, offset) in enumerate(zip(batch.instances, batch.offset, strict=True))
    ]


def _by_steps(model: HookedModel, instance: Instance) -> torch.Tensor:
    prompt = torch.tensor([instance.prompt])
    out = forward(model, prompt, use_cache=True, keep=1)
    rows = [out.logits[0, -1]]
    for token in instance.ids[len(instance.prompt) :]:
        out = forward(
            model, torch.tensor([[token]]), use_cache=True, past_key_values=out.past_key_values
        )
        rows.append(out.logits[0, -1])
    judged = [p - instance.positions[0] for p in instance.positions]
    return torch.stack(rows)[judged].float().cpu()


class Judging(Protocol):
    """Judges answers as `judge` does, here or elsewhere."""

    def __call__(
        self,
        model: HookedModel,
        task: Task,
        instances: Sequence[Instance],
        edits: Sequence[Edit] = (),
        stepwise: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[float, float]]: ...


def judge(
    model: HookedModel,
    task: Task,
    instances: Sequence[Instance],
    edits: Sequence[Edit] = (),
    stepwise: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, float]]:
    """(correct, margin) of each instance under edits. A task judged by "recall" is answered freely,
    the others by their logits at the judged positions."""
    groups = together(task, instances)
    scores = judged(model, task, instances, groups, edits, stepwise, progress)
    order = [i for group in groups for i in group]
    return [score for _, score in sorted(zip(order, scores, strict=True))]


def together(task: Task, instances: Sequence[Instance]) -> list[list[int]]:
    """Which instances are run together, in the order in which they are run."""
    if task.judge == "recall":
        return [[i] for i in range(len(instances))]
    # rows of one length need no padding, so the shortest run together, and so on
    order = sorted(range(len(instances)), key=lambda i: len(instances[i].ids))
    return [[order[k] for k in group] for group in grouped([instances[i] for i in order])]


def judged(
    model: HookedModel,
    task: Task,
    instances: Sequence[Instance],
    groups: Sequence[Sequence[int]],
    edits: Sequence[Edit] = (),
    stepwise: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, float]]:
    """(correct, margin) of the instances of these groups, in their order."""
    scores: list[tuple[float, float]] = []
    pad = pad_id(model.tokenizer)
    with model.edit(*edits):
        for group in groups:
            some = [instances[i] for i in group]
            if task.judge == "recall":
                scores += [task.heard(model.tokenizer, one, freely(model, one)) for one in some]
            else:
                logits = answer_logits(model, collate(some, pad), stepwise)
                scores += [task.score(x, one) for x, one in zip(logits, some, strict=True)]
            if progress:
                progress(len(scores))
    return scores


def freely(model: HookedModel, instance: Instance) -> list[int]:
    """What the model says by itself: greedily, at most `info["steps"]` tokens, to the end of the
    text or of the line."""
    ends = stop_tokens(model) | set(instance.info["ends"])
    return greedy(model, torch.tensor([instance.prompt]), instance.info["steps"], ends)


def said(model: HookedModel, instance: Instance, least: int = 8) -> str:
    """What the model says greedily after a prompt: as many tokens as the answer has, `least` at
    least, as far as the model has places for them; special tokens spelled out."""
    steps = max(least, len(instance.accept))
    if model.max_context is not None:
        steps = min(steps, model.max_context - len(instance.prompt) + 1)
    tokens = greedy(model, torch.tensor([instance.prompt]), steps, stop_tokens(model))
    return str(model.tokenizer.decode(tokens))
