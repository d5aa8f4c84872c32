"""CCA: image tokens at concentric positions, so that all of the picture is near the text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import EditError, InputError
from interp.vision.prompts import has_sections, needs_images, spans
from interp_hooks.edit import LiveEdit

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class CCA:
    """Concentric causal attention (CCA): image patches stand in rings, by position and mask.

    (Xing et al., NeurIPS 2024, arXiv 2410.15926.)

        ``with CCA().on(model): model.generate(**inputs)``

    The patches of an image, rows × columns, stand in rings: the border's at the image's first
    position p, the next ring's at p + 1, …, the innermost at p + R − 1, with R = ⌈min(rows,
    columns) / 2⌉; the text goes on at p + R, as if the image had R tokens. With `mask`, patches of
    an image see those of it in their own ring and in outer ones (before and after them), instead of
    those before them; text sees all of the image, as ever.

    Positions and mask are those of the paper and its code. Its models are *trained* so; on another
    model this changes what it was trained with. Batches, left and right padding, several images, KV
    cache, greedy, sampled and beam search. The second predictions of DAMRO and RITUAL are made
    without it.

    Args:
        mask: the concentric causal mask beside the positions.
        grid: (rows, columns) of an image's patches; None: square.

    Misleads:
        Its models are trained so. Another model was trained with other positions and another mask,
        and is harmed.

    Raises:
        EditError: a grid of fewer than one patch; in use, a model that adds position biases to its
            scores.
        InputError: on entry, a text-only model, one without position ids, or with positions of
            several dimensions (Qwen-VL); in use, image tokens that don't fill the grid, a prompt
            that was read outside the block.

    Example:
        >>> model = interp.load("llava")
        >>> picture = np.zeros((56, 56, 3), "uint8")
        >>> inputs = interp.vision.with_images(model, ["a red circle ?"], [picture])
        >>> with interp.procedures.CCA().on(model):
        ...     out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        >>> out.shape[0]
        1
    """

    mask: bool = True
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise EditError(f"The grid of CCA is (rows, columns), each from 1 up, not {self.grid}.")

    def rings(self, tokens: int) -> torch.Tensor:
        """The ring of each patch in reading order, 0 at the border, (tokens,) int64.

        Args:
            tokens: patches of the image.

        Raises:
            InputError: they don't fill the grid.

        Example:
            >>> interp.procedures.CCA().rings(9).tolist()
            [0, 0, 0, 0, 1, 0, 0, 0, 0]
        """
        side = math.isqrt(tokens)
        rows, columns = self.grid or (side, side)
        if rows * columns != tokens:
            raise InputError(
                f"CCA needs an image of {rows} × {columns} patches, and this one has {tokens} "
                "tokens; give grid=, or "
                "use a model with one token a patch, like LLaVA-1.5."
            )
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        return torch.minimum(
            torch.minimum(row, rows - 1 - row), torch.minimum(column, columns - 1 - column)
        ).flatten()

    def positions(self, model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Position ids of a prompt, (batch, tokens): 0 for the first real token.

        Those of padding mean nothing.

        Args:
            model: a vision-language model.
            inputs: a prompt with images.
        """
        from interp.loading import load

        hooked = load(model)
        needs_images(hooked, "CCA")
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        base = (torch.ones_like(ids) if mask is None else mask).long().cumsum(-1) - 1
        return base.clamp_min(0) - self._layout(hooked, ids).shift

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Gives the model these positions and mask, until the block ends.

        Args:
            model: a vision-language model.

        Raises:
            InputError: a text-only model, or one without one position id a token.
        """
        from interp.loading import load

        hooked = load(model)
        needs_images(hooked, "CCA")
        if "position_ids" not in hooked.accepts or has_sections(hooked):
            raise InputError(
                f"CCA needs a model with one position id a token, and {hooked.name} has others."
            )
        watch = _Positions(self, hooked)
        handle = hooked.module.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            with hooked.edit(watch.edit):
                yield
        finally:
            handle.remove()

    def _layout(self, model: HookedModel, ids: torch.Tensor) -> _Layout:
        shift, ring = torch.zeros_like(ids), torch.full_like(ids, -1)
        image = torch.full_like(ids, -1)
        for row, row_spans in enumerate(spans(model, ids)):
            for number, (start, stop) in enumerate(row_spans):
                rings = self.rings(stop - start).to(ids.device)
                shift[row, start:stop] += torch.arange(stop - start, device=ids.device) - rings
                shift[row, stop:] += stop - start - int(rings.max()) - 1
                ring[row, start:stop], image[row, start:stop] = rings, number
        return _Layout(shift, ring, image)


@dataclass(frozen=True)
class _Layout:
    """Of each token, (batch, slots): by how much its position is less than it was, its ring, and
    its image (−1)."""

    shift: torch.Tensor
    ring: torch.Tensor
    image: torch.Tensor


class _Positions:
    """A forward pre-hook of the model that moves position ids; `layout` is that of the tokens it
    reads now."""

    def __init__(self, cca: CCA, model: HookedModel) -> None:
        self.cca, self.model, self.edit = cca, model, _RingMask(self)
        self.layout: _Layout | None = None
        self._last: torch.Tensor | None = None  # (batch, 1) shift of the last token
        self._read = 0  # slots

    def __call__(
        self, module: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if not any(edit is self.edit for edit in self.model.observers_and_edits()[1]):
            return args, kwargs  # a clean run, between the steps of another text
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, torch.Tensor):
            raise InputError("CCA finds the image by its tokens; give input_ids, not embeddings.")
        length = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
        before = int(length()) if length is not None else 0
        layout = self.cca._layout(self.model, ids)
        if before:
            layout = replace(layout, shift=layout.shift + self._carried(before, len(ids)))
        mask = kwargs.get("attention_mask")
        if mask is None:  # else positions that don't go up by one pass for several packed texts
            mask = torch.ones(len(ids), before + ids.shape[1], dtype=torch.long, device=ids.device)
        base = kwargs.get("position_ids")
        if base is None:
            if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
                raise InputError(
                    "CCA needs position_ids, or a mask (batch, tokens) to count them from."
                )
            base = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        self.layout, self._last, self._read = layout, layout.shift[:, -1:], before + ids.shape[1]
        return args, {**kwargs, "attention_mask": mask, "position_ids": base - layout.shift}

    def _carried(self, before: int, rows: int) -> torch.Tensor:
        """(rows, 1): the shift of what comes after the tokens in the cache."""
        if self._last is None or self._read != before or rows % len(self._last):
            raise InputError(
                "CCA needs the prompt to be read in its block too, before what follows it."
            )
        return self._last.repeat_interleave(rows // len(self._last), 0)


class _RingMask(LiveEdit):
    """Patches of an image see their own ring and outer ones, while the image is read."""

    def __init__(self, watch: _Positions):
        self.watch = watch

    def touches(self, call: AttentionCall) -> bool:
        layout = self.watch.layout
        here = call.site.is_main and self.watch.cca.mask
        return here and layout is not None and bool((layout.image >= 0).any())

    def before(self, call: AttentionCall) -> AttentionCall:
        layout, mask = self.watch.layout, call.mask
        assert layout is not None
        if mask.dense is not None and mask.dense.dtype != torch.bool:
            raise EditError(
                "CCA's mask is not defined here: this model adds position biases to the scores."
            )
        if mask.window is not None and mask.window < call.n_keys:
            raise EditError(
                f"CCA's mask needs whole attention, and layer {call.site.layer} has a sliding "
                "window."
            )
        rows = torch.arange(call.n_queries, device=call.value.device) + mask.q_start
        columns = torch.arange(call.n_keys, device=call.value.device) + mask.k_start
        sees = (
            columns <= rows[:, None] if mask.causal else torch.ones_like(columns <= rows[:, None])
        )
        sees = sees[None, None] if mask.dense is None else sees & mask.dense
        pad = (
            call.n_keys - layout.image.shape[1]
        )  # the image is in the rows at hand, the last columns
        image, ring = (
            torch.nn.functional.pad(x, (pad, 0), value=-1) for x in (layout.image, layout.ring)
        )
        same = (layout.image[:, :, None] == image[:, None]) & (layout.image >= 0)[:, :, None]
        outer = ring[:, None] <= layout.ring[:, :, None]  # (batch, queries, keys)
        sees = torch.where(same[:, None], outer[:, None], sees)
        return replace(call, mask=replace(mask, causal=False, window=None, dense=sees))

    def route(self, site: Site) -> str:
        return "cca: a mask of rings within the image"
