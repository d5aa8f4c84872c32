"""Reference outputs for mean and resample ablation: z of the unedited model on a task's corrupted
prompts or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp import tasks
from interp.inputs.forward import forward
from interp.inputs.text import text_rows
from interp.tasks.catalogue import FILES
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats

if TYPE_CHECKING:
    from interp_hooks.protocol import Model

SAMPLES = 32
#: tokens of a sample of a file
LENGTH = 256
#: vectors kept a layer: plenty for a mean, small enough to keep
KEEP = 4096


@torch.no_grad()
def reference_z(
    model: Model, reference: str, layers: set[int], seed: int
) -> dict[int, torch.Tensor]:
    """layer → (vectors, heads, d_head): z over the reference's samples and positions, pooled, at
    most `KEEP`.

    Raises `UnknownNameError` if `reference` is neither a task nor a file.
    """
    own = reference.endswith(FILES)
    if Path(reference).suffix and not own and Path(reference).is_file():
        length = min(LENGTH, model.max_context or LENGTH)
        batches: list[Any] = list(text_rows(model, Path(reference), length, SAMPLES, seed))
    else:
        instances = tasks.get(reference).sample(model.tokenizer, SAMPLES, seed)
        batches = [tasks.collate([i], 0, "corrupted") for i in instances]
    pools: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def note(stats: LayerStats) -> None:
        if stats.site.layer in pools and stats.site.kind == "self":
            assert stats.z is not None
            pools[stats.site.layer].append(
                stats.z[stats.queries].detach().cpu()
            )  # (real tokens, heads, d)

    with model.clean(), model.watch(Question(z=True), note):
        for batch in batches:
            forward(model, batch.input_ids, batch.attention_mask)
    generator = torch.Generator().manual_seed(seed)
    joined = {layer: torch.cat(parts) for layer, parts in pools.items()}
    return {
        layer: z[torch.randperm(len(z), generator=generator)[:KEEP]] for layer, z in joined.items()
    }
