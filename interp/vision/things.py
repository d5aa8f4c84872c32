"""The patches of each thing in rendered scenes, and the tokens of a text that speak of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from interp import scenes
from interp.errors import InputError
from interp.inputs.tokenizer import Text
from interp.inputs.words import places, whole_word
from interp.scenes.words import DESCRIBE
from interp.vision.continued import continued
from interp.vision.prompts import needs_image_tokens, own_positions, with_images
from interp.vision.token_grids import TokenGrid, token_grids
from interp_hooks.huggingface.images import image_token

if TYPE_CHECKING:
    from interp.scenes import Scene, Thing
    from interp.vision.pictures import Pictures
    from interp_hooks.model import HookedModel

#: what is asked about in a question about nothing
NOTHING = "N/A"


class Looked(NamedTuple):
    """Tokens of a prompt that speak of a thing (`rows`, slots), the slots of the patches on it
    (`gold`), and those of the picture's other patches (`others`); `word`: the ids of the thing's
    word where the rows predict it."""

    rows: list[int]
    gold: torch.Tensor
    others: torch.Tensor
    word: tuple[int, ...] = ()


def told(model: HookedModel, pictures: Pictures) -> Iterator[tuple[dict[str, Any], list[Looked]]]:
    """Each scene with its true caption read after the prompt: inputs, and a `Looked` for each
    thing, whose row is the token just before the thing's word.

    Raises:
        InputError: no scenes, or a model whose patches can't be placed.
    """
    reader, tokenizer = Text(model.tokenizer), model.tokenizer
    prompt = pictures.prompt or DESCRIBE
    patches = _Patches(model)
    for scene in _scenes(model, pictures):
        picture = scenes.render(scene)
        inputs = with_images(model, prompt, [picture])
        # after a chat template's last line break nothing parts the words
        space = "" if _ends_with_space(tokenizer, inputs["input_ids"][0]) else " "
        said = reader.encode(space + scenes.caption(scene))
        start = inputs["input_ids"].shape[1]
        found = []
        for thing in scene.things:
            gold, others = patches.of(thing, inputs, prompt, picture)
            spelled = places(tokenizer, said, whole_word(thing.name))
            if not spelled:
                raise InputError(
                    f"The tokenizer of {model.name} does not give the word {thing.name!r} back, so "
                    "the token that names the thing can't be told."
                )
            if len(gold):
                first, stop = spelled[0]
                word = tuple(said[first:stop])
                found.append(Looked([start + first - 1], gold, others, word))
        yield continued(model, inputs, said), found
    patches.check()


def asked(model: HookedModel, pictures: Pictures) -> Iterator[tuple[dict[str, Any], list[Looked]]]:
    """Each scene with the question about one thing in it, and with the same about nothing, as two
    left-padded prompts: inputs, and for each a `Looked` whose rows are the question's.

    The thing is drawn by the scene's seed among those with patches; scenes without one are left
    out.

    Raises:
        InputError: no scenes, or a model whose patches can't be placed.
    """
    patches = _Patches(model)
    token = _image_token(model)
    for number, scene in enumerate(_scenes(model, pictures)):
        picture = scenes.render(scene)
        rng = np.random.default_rng([pictures.seed, number, 1])
        for k in rng.permutation(len(scene.things)):
            thing = scene.things[k]
            text = scenes.question(thing.name)
            alone = with_images(model, text, [picture])
            gold, others = patches.of(thing, alone, text, picture)
            if len(gold):
                break
        else:
            continue
        texts = [text, scenes.question(NOTHING)]
        inputs = {**with_images(model, texts, [[picture]] * 2), **own_positions(model)}
        found = []
        is_image = torch.eq(alone["input_ids"][0], token)
        first = int(is_image.int().argmax())
        for row in inputs["input_ids"]:
            # the picture's tokens and what parts them are the same, further right by the padding
            is_image = torch.eq(row, token)
            shift = int(is_image.int().argmax()) - first
            found.append(Looked(_question(model, row), gold + shift, others + shift))
        yield inputs, found
    patches.check()


def _scenes(model: HookedModel, pictures: Pictures) -> Iterator[Scene]:
    needs_image_tokens(model, "Looking at the named thing")
    if pictures.folder is not None:
        raise InputError(
            f"Where each thing lies is known in rendered scenes alone, not in the pictures of "
            f"{pictures.folder}."
        )
    for i in range(pictures.samples):
        yield scenes.usual(np.random.default_rng([pictures.seed, i]))


def _image_token(model: HookedModel) -> int:
    """The token that stands for a part of a picture; `_scenes` refuses models that have none."""
    token = image_token(model.module.config)
    assert token is not None
    return token


def _ends_with_space(tokenizer: Any, ids: torch.Tensor) -> bool:
    text = str(tokenizer.decode(ids[-1:].tolist(), clean_up_tokenization_spaces=False))
    return text[-1:].isspace()


def _question(model: HookedModel, row: torch.Tensor) -> list[int]:
    """The slots of the question in a prompt."""
    is_image = torch.eq(row, _image_token(model))
    last = int(is_image.nonzero()[-1])
    before, _, after = scenes.question(NOTHING).partition(NOTHING)
    spelled = [r"\s*".join(map(re.escape, part.split())) for part in (before, after)]
    rest = row[last + 1 :].tolist()
    found = places(model.tokenizer, rest, rf"{spelled[0]}\s.+?{spelled[1]}")
    if not found:
        raise InputError(
            f"The question {scenes.question('table')!r} is not found among the tokens of "
            f"{model.name}, so what looks at the thing can't be told."
        )
    start, stop = found[-1]
    return [last + 1 + k for k in range(start, stop)]


class _Patches:
    """The patches of things, by the layout of scenes: all have the same size, so that one prompt's
    grids are every prompt's in which the image's tokens stand in the same slots."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self._known: list[tuple[torch.Tensor, list[TokenGrid]]] = []
        self._any, self._tokens = False, 0

    def of(
        self, thing: Thing, inputs: dict[str, Any], prompt: str, picture: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gold,) and (others,) slots: patches whose middle lies in the thing's cell, and those
        elsewhere."""
        grids = self._grids(inputs, prompt, picture)
        gold, others = split(grids, cell(thing))
        self._any, self._tokens = self._any or len(gold) > 0, len(gold) + len(others)
        return gold, others

    def check(self) -> None:
        """Raise `InputError` where no thing had a patch."""
        if not self._any:
            raise InputError(
                f"{self.model.name} reads a scene as {self._tokens} patches, of which none lies "
                "on a thing."
            )

    def _grids(self, inputs: dict[str, Any], prompt: str, picture: Any) -> list[TokenGrid]:
        slots = torch.eq(inputs["input_ids"][0], _image_token(self.model)).nonzero()
        for before, grids in self._known:
            if torch.equal(before, slots):
                return grids
        grids = token_grids(self.model, inputs, prompt, picture)
        self._known.append((slots, grids))
        return grids


def cell(thing: Thing) -> tuple[float, float, float, float]:
    """The cell of a thing: left, top, right, bottom in shares of the picture."""
    return thing.column / 3, thing.row / 3, (thing.column + 1) / 3, (thing.row + 1) / 3


def split(
    grids: Sequence[TokenGrid], box: tuple[float, float, float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of the patches whose middle lies in a part of the picture, and of all others, of all
    grids."""
    inside, outside = [], []
    for grid in grids:
        left, top, right, bottom = grid.box
        rows, columns = grid.slots.shape
        x = left + (torch.arange(columns).double() + 0.5) * (right - left) / columns
        y = top + (torch.arange(rows).double() + 0.5) * (bottom - top) / rows
        across = (x >= box[0]) & (x < box[2])
        down = (y >= box[1]) & (y < box[3])
        there = down[:, None] & across[None]
        inside.append(grid.slots[there])
        outside.append(grid.slots[~there])
    return torch.cat(inside), torch.cat(outside)
