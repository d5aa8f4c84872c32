"""`Model`: a `HookedModel` that reads texts, and shows where its heads look in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.inputs.forward import forward
from interp.inputs.text import content
from interp.inputs.tokenizer import pad_id
from interp.support.html import block
from interp_hooks.chatting import chat_inputs
from interp_hooks.edit import edits_of
from interp_hooks.model import HookedModel
from interp_hooks.token_ids import check_text
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from typing_extensions import Self

    from interp.look.look import Look
    from interp.look.why import Why


_NO_INPUT = "A model is given a text, a list of texts or a tensor of token ids, not {}."


class Model(HookedModel):
    """A model with its heads at hand: what `interp.load` gives.

    All of `HookedModel` (observe, edit, capture), and faces for texts: `attention`, `look`, and
    texts in place of token ids in a call and in `generate`.

    Example:
        >>> model
        HookedModel(pocket-llama: 4 layers × 8 heads, 4 kv heads)
        >>> model("the cat saw the dog").logits.shape[:2]
        torch.Size([1, 6])
    """

    #: what `interp.load` was given, so that other processes can load the same; None for a model
    #: that came as an object
    recipe: dict[str, Any] | None = None

    def attention(
        self,
        text: str | Path | torch.Tensor,
        heads: Any = None,
        *,
        chat: bool = False,
        edits: Sequence[Any] = (),
    ) -> torch.Tensor:
        """Attention weights A[query, key] of heads over a short text, float32 on the CPU.

        They take 4 bytes × heads × tokens²; above 4 GiB they are refused, and `look` and `observe`
        are the ways round.

        Args:
            text: a text, a `Path` to one, or token ids.
            heads: one head ("L5H1") or several; None for all of the main tower.
            chat: the text is a user's message, put into the tokenizer's chat template.
            edits: edits to apply; those of the block around the call act as well.

        Returns:
            (tokens, tokens) of one head, (heads, tokens, tokens) of several, (layers, heads,
            tokens, tokens) of all.

        Raises:
            HeadError: no such head.
            InputError: more than 4 GiB, no tokenizer, an empty text.
            ContextError: a text longer than the model reads.

        Example:
            >>> a = model.attention("the cat saw the dog", "L0H2")
            >>> a.shape, bool(torch.allclose(a.sum(-1), torch.ones(6)))
            (torch.Size([6, 6]), True)
        """
        from interp.look import measure

        return measure.weights_of(self, text, heads, chat=chat, edits=edits_of(edits))

    def look(
        self,
        text: str | Path | torch.Tensor,
        head: Any,
        *,
        chat: bool = False,
        edits: Sequence[Any] = (),
    ) -> Look:
        """Where a head looks in a text of any length, to be read in Jupyter or as a page.

        For each token the keys it looks at most, by weight and by how far they move the stream
        (a‖v W_O‖, Kobayashi et al. 2020, arXiv 2004.10102: a sink moves it less than its weight
        says), who looks at it most, its entropy and the first token's weight: exact, in O(tokens)
        memory.

        Args:
            text: a text, a `Path` to one, or token ids.
            head: the head, in any spelling.
            chat: the text is a user's message, put into the tokenizer's chat template.
            edits: edits whose run is shown beside the untouched one.

        Returns:
            A `Look`: it shows itself in Jupyter; `report("look.html")` writes a page, `frame` and
            `at(token)` give numbers.

        Raises:
            HeadError: no such head.
            InputError: no tokenizer, an empty text.
            ContextError: a text longer than the model reads.

        Example:
            >>> look = model.look("the cat saw the dog . the cat saw the dog .", "L2H4")
            >>> look
            Look(pocket-llama L2H4: 15 tokens)
        """
        from interp.look import measure

        return measure.look_at(self, text, head, chat=chat, edits=edits_of(edits))

    def why(
        self,
        text: str | Path | torch.Tensor,
        head: Any,
        query: int | None = None,
        key: int | None = None,
        *,
        answer: str | int | None = None,
        against: str | int | None = None,
        chat: bool = False,
    ) -> Why:
        """Why a head looks from one token at another, and which tokens it moves the answer by.

        The score before softmax, scaling · q·k, as a sum over pairs of earlier writers, one of the
        query's stream and one of the key's (`mechanics.qk_attribution`); and what each key adds to
        the answer's logit at the query through this head (`mechanics.sources`). Both are exact,
        with the norms' scales held at their values in the run.

        Args:
            text: a text, a `Path` to one, or token ids.
            head: the head, in any spelling.
            query: where it looks from; the last token if not given.
            key: where it looks; the token that it looks at most besides the first, if not given.
            answer: the token whose logit keys push, a text of one token or its id; the one that the
                model says next if not given.
            against: a token whose logit is taken off; the mean of the vocabulary if not given.
            chat: the text is a user's message, put into the tokenizer's chat template.

        Returns:
            A `Why`: it shows itself in Jupyter; `top()`, `by_query()`, `by_key()` and `keys()` give
            tables, `to_dict()` JSON.

        Raises:
            HeadError: no such head.
            InputError: no tokenizer, an empty text, a place outside it, a key that the query does
                not see, an answer of several tokens, or edits that are active.
            ContextError: a text longer than the model reads.
            TapError: the model's stream is not the sum of what heads and MLPs write, or its norms
                or projections are not known.

        Example:
            >>> why = model.why("the cat saw the dog . the cat saw the dog .", "L2H4", 8)
            >>> why.top(1).columns.tolist(), len(why.by_key()) == len(why.qk.writers)
            (['query', 'key', 'score'], True)
        """
        from interp.look import reasons

        return reasons.why_of(
            self, text, head, query, key, answer=answer, against=against, chat=chat
        )

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The wrapped model's forward; a text, or a list of texts, in place of token ids.

        A `Path` is the text in its file. Several texts are padded on the left, and the padding is
        masked.
        """
        if args and (texts := self._texts(args[0])) is not None:
            rows = self.tokens(texts)
            return forward(self, rows["input_ids"], rows["attention_mask"], **inputs)
        if args and (args[0] is None or isinstance(args[0], (int, float, bytes, type, dict))):
            raise InputError(_NO_INPUT.format(quoted(args[0])))
        return super().__call__(*args, **inputs)

    def generate(self, *args: Any, chat: bool = False, **inputs: Any) -> Any:
        """Generates text: token ids from token ids, as `HookedModel.generate`; text from text.

        Args:
            args: a text (or a `Path` to one), whose continuation comes back as a text, or a list of
                texts, whose continuations come back as a list. Decoding is greedy then, unless
                `do_sample` or a generation setting says otherwise, of 64 new tokens at most.
            chat: a text is a user's message, answered in the tokenizer's chat template; by default
                it is continued as it is, as `interp generate` does without `--chat`.
            inputs: those of the wrapped model's `generate`.

        Raises:
            InputError: no input, or a chat that is no text or has no template.

        Example:
            >>> said = model.generate("the cat saw the", max_new_tokens=3)
            >>> isinstance(said, str)
            True
        """
        texts = self._texts(args[0]) if args else None
        if chat and texts is None:
            raise InputError("chat=True takes a user's message as a text, or a list of them.")
        if texts is None and args:
            if isinstance(args[0], torch.Tensor) and len(args) == 1:
                return super().generate(input_ids=args[0], **inputs)
            raise InputError(_NO_INPUT.format(quoted(args[0])))
        if texts is None:
            return super().generate(**inputs)
        if not chat:
            prompt = self.tokens(texts)
        elif isinstance(texts, str):
            prompt = chat_inputs(self, texts)
        else:  # answered one by one, as templates do not pad
            return [self.generate(t, *args[1:], chat=True, **inputs) for t in texts]
        usual: dict[str, Any] = dict(do_sample=False)
        if "max_length" not in inputs:
            usual["max_new_tokens"] = 64
        ids = super().generate(*args[1:], **{**usual, **prompt, **inputs})
        length = prompt["input_ids"].shape[1]
        echoes = ids.shape[1] >= length and bool(
            (ids[:, :length] == prompt["input_ids"].to(ids.device)).all()
        )
        said = self.tokenizer.batch_decode(
            ids[:, length if echoes else 0 :], skip_special_tokens=True
        )
        return said[0] if isinstance(texts, str) else said

    def tokens(self, texts: str | Sequence[str]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask (texts, tokens) of one or several texts, padded on the left.

        With the special tokens that the tokenizer puts before a text.

        Raises:
            InputError: no tokenizer, no text, or an empty one.

        Example:
            >>> model.tokens(["the cat", "the cat saw the dog"])["attention_mask"][0]
            tensor([0, 0, 0, 1, 1, 1])
        """
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} has no tokenizer, so it can't read a text; give token ids, or load "
                "it with tokenizer=."
            )
        if isinstance(texts, Path):
            texts = content(texts)
        if not isinstance(texts, (str, Sequence)):
            raise InputError(f"tokens reads a text or a list of texts, not {quoted(texts)}.")
        several = [texts] if isinstance(texts, str) else list(texts)
        rows = [list(self.tokenizer.encode(check_text(t), verbose=False)) for t in several]
        if not rows or not all(t.strip() for t in several):
            raise InputError("A text is empty; give some text.")
        width, pad = max(map(len, rows)), pad_id(self.tokenizer)
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=self.device)
        mask = torch.tensor(
            [[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device
        )
        return dict(input_ids=ids, attention_mask=mask)

    def _texts(self, given: Any) -> str | list[str] | None:
        """A text or texts as they were given; None for what is none."""
        if isinstance(given, Path):
            return content(given)
        if isinstance(given, str):
            return given
        if isinstance(given, (list, tuple)) and given and all(isinstance(t, str) for t in given):
            return list(given)
        return None

    def _repr_html_(self) -> str:
        sizes = {t: _size_of(self, t) for t in self.towers}
        several = len(sizes) > 1
        facts = {
            **({t or "main": size for t, size in sizes.items()} if several else {}),
            "parameters": f"{sum(p.numel() for p in self.module.parameters()):,}",
            "dtype": ", ".join(
                sorted({str(p.dtype).removeprefix("torch.") for p in self.module.parameters()})
            ),
            "device": str(self.device),
            "context": "" if self.max_context is None else f"{self.max_context:,} tokens",
            "from": ", ".join(str(v) for v in self.origin.values() if isinstance(v, str)),
        }
        about = "" if several else next(iter(sizes.values()))
        return block(self.name, about, facts, notes=[self.note or ""])

    @property
    def config(self) -> Any:
        """The wrapped model's config."""
        module = self.module
        return module.config if hasattr(module, "config") else module.cfg

    @property
    def dtype(self) -> torch.dtype:
        """Of the wrapped model's parameters."""
        return next(self.module.parameters()).dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves or casts the wrapped model, as `torch.nn.Module.to` does; returns this model."""
        self.module.to(*args, **kwargs)
        return self

    def eval(self) -> Self:
        """Puts the wrapped model into evaluation mode; returns this model."""
        self.module.eval()
        return self


def _size_of(model: HookedModel, tower: str) -> str:
    """Layers × heads of a tower, as people say it."""
    sites = [s for s in model.sites if s.tower == tower]
    sites = [s for s in sites if s.kind == "self"] or sites
    heads, shared = max(s.n_heads for s in sites), max(s.n_kv_heads for s in sites)
    kv = f" ({shared} key/value heads)" if shared != heads else ""
    return f"{len({s.layer for s in sites})} layers × {heads} heads of {sites[0].d_head}{kv}"
