"""A HuggingFace checkpoint that gives without this toolkit what a model gives under edits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp import edits as every_edit
from interp.baking.architecture import rebuilt
from interp.baking.weights import folded_weights
from interp.edits.fold import composed
from interp.edits.head_edit import HeadEdit
from interp.errors import EditError, InputError, OutputError
from interp.loading import load
from interp.support.checked import path as checked_path
from interp.support.files import check_writable, reason
from interp.support.provenance import versions
from interp.support.weights import weights_hash
from interp_hooks.edit import edits_of
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

RECORD = "interp-export.json"
#: the most that logits of the checkpoint may differ from those under the edits, by the dtype of the
#: weights; of their largest where it is above 1
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: tokens of the rows on which that is held
TOKENS = 48


@torch.no_grad()
def export(
    model: Any,
    edits: Sequence[HeadEdit] | HeadEdit,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a HuggingFace checkpoint with edits baked into its weights.

    What acts on z alike for every token is a change of the output projection,

        Σ_h W_O,h (γ_h z_h + b_h) = Σ_h (γ_h W_O,h) z_h + Σ_h W_O,h b_h

    so that gains (`ScaleHeads`), vectors added (`ShiftHeads`), zero ablation (γ = 0) and mean
    ablation (γ = 0, b the mean) need nothing of this toolkit, and no time, where the checkpoint is
    used. An offset needs a bias of the output projection. Llama, Gemma, Qwen3 and others get one by
    their config's `attention_bias`; Qwen2 and Mistral without windows are written as Llama, which
    computes the same.

    The folder is loaded again by transformers alone and its logits are held against those of the
    model under the edits, before it gets its name.

    Args:
        model: a `HookedModel` of a transformers model, or anything `interp.load` takes.
        edits: in order.
        folder: of the checkpoint; made.
        overwrite: replace what lies there.

    Returns:
        the folder: `config.json`, weights, tokenizer, and `interp-export.json` with the edits, the
        base's hash, and by how much logits differ (`differs`) beside how much the edits move them
        (`moves`).

    Raises:
        EditError: an edit that depends on the prompt, or does not act on every token.
        InputError: a model that is none of transformers; weights that can't be rewritten; no place
            for an offset.
        OutputError: the folder is not empty, can't be written, or the checkpoint is not the same.

    Example:
        >>> folder = interp.export(model, [interp.edits.ScaleHeads({"L2H3": 0.0})], "baked")
        >>> baked, ids = interp.load(folder), torch.arange(8)[None]
        >>> with model.edit(interp.edits.Ablate(["L2H3"])):
        ...     bool(torch.allclose(baked.logits(ids), model.logits(ids), atol=1e-4))
        True
    """
    target = checked_path(folder, "The folder of a checkpoint")
    hooked, active = load(model), _checked(edits)
    _check_kind(hooked)
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise OutputError(
            f"{target} is there already; choose another folder, or replace it (overwrite=True, "
            "--overwrite)."
        )
    check_writable(target.parent)
    with hooked.clean():
        folds = composed(edit.folded(hooked) for edit in active if not edit.is_identity())
        weights, biases = folded_weights(hooked, folds)
        new = rebuilt(hooked.module, weights, biases)
        ids = hooked.short_rows(min(TOKENS, hooked.max_context or TOKENS))
        with hooked.edit(*active):
            wanted = hooked.logits(ids).float().cpu()
        plain = hooked.logits(ids).float().cpu()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            _save(hooked, new, temporary)
            del new
            differs = _difference(temporary, hooked, ids, wanted)
            record = {
                "edits": every_edit.to_json(active, temporary),
                "base": {
                    "model": hooked.name,
                    "weights_hash": weights_hash(hooked.module),
                    "origin": hooked.origin,
                },
                "differs": differs,
                "moves": float((wanted - plain).abs().max()),
                "versions": versions(),
            }
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            (temporary / RECORD).write_text(text, encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"Can't write {target} ({reason(error)}); choose another place or make room."
        ) from error
    return target


def _checked(edits: Any) -> list[HeadEdit]:
    found = edits_of(edits)
    for edit in found:
        if not isinstance(edit, HeadEdit):
            raise EditError(f"{quoted(edit)} is no edit of interp.edits, and can't be baked.")
    return found


def _check_kind(model: HookedModel) -> None:
    import transformers

    if not isinstance(model.module, transformers.PreTrainedModel):
        raise InputError(
            f"{model.name} is a {type(model.module).__name__}; a checkpoint is written of a "
            "transformers model: load it by its name or folder, and merge adapters first "
            "(merge_and_unload)."
        )


def _save(model: HookedModel, new: Any, folder: Path) -> None:
    """The checkpoint, with the tokenizer and the processor of the model."""
    new.save_pretrained(folder)
    for extra in (model.tokenizer, model.processor):
        if extra is not None and hasattr(extra, "save_pretrained"):
            extra.save_pretrained(folder)


def _difference(folder: Path, model: HookedModel, ids: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of the checkpoint's logits, read by transformers alone. Raises
    `OutputError` where it is more than rounding."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0], type(model.module))
    dtype = model.module.dtype
    again = kind.from_pretrained(folder, dtype=dtype).to(model.device).eval()
    logits = again(input_ids=ids, use_cache=False).logits.float().cpu()
    apart = float((logits - wanted).abs().max())
    allowed = CLOSE.get(dtype, 1e-4) * max(1.0, float(wanted.abs().max()))
    if not apart <= allowed:
        raise OutputError(
            f"The checkpoint gives other logits than {model.name} under these edits (by {apart:.2g}"
            f", {allowed:.2g} allowed), so it was not kept; please report this architecture."
        )
    return apart
