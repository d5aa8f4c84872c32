"""`HookedModel`: one face for HuggingFace and TransformerLens models, to see and change
attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from interp_hooks import chatting, token_ids
from interp_hooks.activations import Activations, Hook, ReplaceActivations, Residual, noting
from interp_hooks.adapter import Adapter
from interp_hooks.blocks import Block, Tap, shared_tap
from interp_hooks.call import Site
from interp_hooks.edit import CallEdit, Edit, LiveEdit, checked_edit
from interp_hooks.engine import Observer
from interp_hooks.errors import EditError, HeadError, InputError, TapError
from interp_hooks.head_weights import HeadWeights
from interp_hooks.heads import no_attention
from interp_hooks.logits import logits_of
from interp_hooks.model_facts import ModelFacts
from interp_hooks.norms import Norms
from interp_hooks.question import NAMES, Question
from interp_hooks.recording import LayerStats, Recording
from interp_hooks.resume import skipping
from interp_hooks.vocabulary import TOKENS, Forward, Vocabulary
from interp_hooks.vocabulary import read as read_vocabulary
from interp_hooks.whole_numbers import quoted, whole
from interp_hooks.wrapping import eagerly
from interp_kernels import Received

#: a class that adds methods to `HookedModel`
Face = TypeVar("Face", bound="HookedModel")


class HookedModel(ModelFacts):
    """A model whose attention can be observed and edited.

    `interp.load` and `interp_hooks.hook` make one.

    Attributes:
        name: the model's name.
        module: the wrapped model.
        tokenizer, processor: None where there is none; the processor is of a vision-language model.
        towers: names; [""] when there is one, "text" and "vision" in a vision-language model.
        n_layers, n_heads, n_kv_heads, d_head: of the main tower.
        sites: every attention of the model, in order.
        device: where its parameters are.
        backend: which kernels run.
        note: a sentence that belongs beside the model's name, or None.
        origin: where the weights come from, as results record it; {} where nothing is known.

    Example:
        >>> model.n_layers, model.n_heads, model.d_head
        (4, 8, 32)
        >>> with model.observe("entropy") as seen:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> seen[2].entropy.shape  # batch, heads, queries
        torch.Size([1, 8, 8])
    """

    def __init__(
        self,
        adapter: Adapter,
        name: str,
        tokenizer: Any = None,
        backend: str = "auto",
        note: str | None = None,
        processor: Any = None,
    ):
        self._adapter, self.name, self.tokenizer, self.note = adapter, name, tokenizer, note
        self.processor = processor
        self.origin: dict[str, Any] = {}
        self._backend = backend
        self._tap = shared_tap(adapter.anchors())
        self._caches: list[Callable[[], Any]] = []

    def as_face(self, face: type[Face]) -> Face:
        """The same model, its blocks too, as an object of a class that adds methods to this one."""
        made = face(
            self._adapter, self.name, self.tokenizer, self._backend, self.note, self.processor
        )
        made.origin = self.origin
        return made

    @property
    def backend(self) -> str:
        """Which kernels run: "auto", "reference", "streaming" or "triton"."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend = name

    def __repr__(self) -> str:
        return (
            f"HookedModel({self.name}: {self.n_layers} layers × {self.n_heads} heads, "
            f"{self.n_kv_heads} kv heads)"
        )

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        self._tap.check_thread()
        token_ids.check(self, args, inputs)
        with self._cached(inputs, inputs.get("use_cache") is True):
            return self._adapter.forward(*args, **inputs)

    def logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **more: Any
    ) -> torch.Tensor:
        """Logits of one forward, (batch, tokens, vocabulary).

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens), 0 for padding; None where all are real.
            more: what the model's forward takes besides.

        Example:
            >>> model.logits(torch.arange(8)[None]).shape[:2]
            torch.Size([1, 8])
        """
        if not isinstance(input_ids, torch.Tensor):
            raise InputError(
                f"input_ids are a tensor of token ids, (batch, tokens), not {quoted(input_ids)}."
            )
        out = self(input_ids=input_ids.to(self.device), attention_mask=attention_mask, **more)
        return logits_of(out)

    def generate(self, **inputs: Any) -> torch.Tensor:
        """Generates text: `module.generate(**inputs)`, observed and edited at every step.

        Observers and edits of the blocks around it act at prefill and at every decode step.

        Args:
            inputs: those of the wrapped model's `generate`.

        Returns:
            Prompt and new tokens, (batch, tokens).

        Example:
            >>> inputs = model.tokenizer("the cat", return_tensors="pt")
            >>> out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            >>> out.shape[1] - inputs["input_ids"].shape[1]
            3
        """
        self._tap.check_thread()
        token_ids.check(self, (), inputs)
        with self._cached(inputs, inputs.get("use_cache") is not False):
            return self._adapter.generate(**inputs)

    @contextmanager
    def _cached(self, inputs: dict[str, Any], wanted: bool) -> Iterator[None]:
        """The caches of `caching` put among the inputs where a new one is `wanted`, and the tap in
        place where a cache holds keys that only it can attend to."""
        name = "past_key_values"
        if self._caches and wanted and inputs.get(name) is None:
            inputs[name] = self._caches[-1]()
        if not getattr(inputs.get(name), "held", False):
            yield
            return
        with self._open(Block(holding=True)):
            yield

    @property
    def gives_caches(self) -> bool:
        """Whether a block of `caching` is open, whose caches texts begin with.

        Example:
            >>> model.gives_caches
            False
        """
        return bool(self._caches)

    @contextmanager
    def caching(self, make: Callable[[], Any]) -> Iterator[None]:
        """Gives every text in this block a cache of another kind.

        `generate`, and forwards with `use_cache=True`, begin with the cache that `make` returns,
        unless they are given one.

        Args:
            make: returns a new, empty cache, such as `interp.caches.HeadCache`.

        Example:
            >>> from transformers import DynamicCache
            >>> made = []
            >>> def cache():
            ...     made.append(DynamicCache())
            ...     return made[-1]
            >>> ids = torch.arange(8)[None]
            >>> with model.caching(cache):
            ...     _ = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
            >>> made[0].get_seq_length()
            10
        """
        if not self.has_cache:
            raise TapError(f"{self.name} keeps no cache, so no text can begin with one.")
        self._caches.append(make)
        try:
            yield
        finally:
            self._caches.remove(make)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        system: str | None = None,
        max_new_tokens: int = 64,
    ) -> str:
        """The model's answer to a chat, by its tokenizer's template, greedily.

        Observers and edits of the blocks around it act, as in `generate`; an edit finds words of
        the filled-in template by their text, as in
        ``model.edit(interp.edits.ScaleTokens(interp.edits.Span("in one word"), 4.0))``.

        Args:
            messages: what the user says, or messages ``{"role": …, "content": …}`` in order.
            system: a system prompt before them; None for the template's own, if it has one.
            max_new_tokens: of the answer, at most.

        Returns:
            The answer without special tokens and outer blanks; "", with a warning that says why,
            where the model ends at once.

        Raises:
            InputError: no tokenizer, a tokenizer without a chat template or whose template does
                not take these messages, no message to answer, or no token to write.

        Example:
            >>> model.tokenizer.chat_template = (
            ...     "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}answer :"
            ... )
            >>> isinstance(model.chat("the cat saw the dog", max_new_tokens=4), str)
            True
            >>> model.tokenizer.chat_template = None
            >>> model.chat("the cat saw the dog")
            Traceback (most recent call last):
            interp_hooks.errors.InputError: This tokenizer has no chat template; ...
        """
        return chatting.chat(self, messages, system, max_new_tokens)

    @contextmanager
    def _block(
        self, observers: Sequence[Observer] = (), edits: Sequence[Edit | LiveEdit] = ()
    ) -> Iterator[None]:
        """Add observers and edits for the length of a block, on top of those of every handle on the
        same model; the tap itself is installed by the outermost one."""
        self._tap.check_thread()
        bound = [(edit, edit.bind(self)) for edit in edits]
        active = [one for edit, one in bound if not edit.is_identity()]
        with self._open(Block(list(observers), active)):
            yield

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Suspends outer observers and edits for the length of a block.

        For reference runs, also between the steps of another text.

        Example:
            >>> ids = torch.arange(8)[None]
            >>> own = model.logits(ids)
            >>> with model.edit(interp.edits.Ablate()), model.clean():
            ...     bool((model.logits(ids) == own).all())
            True
        """
        with self._open(Block(clean=True)), self._tap.aside():
            yield

    def _open(self, block: Block) -> AbstractContextManager[None]:
        block.backend = lambda: self._backend
        return self._tap.open(block, self._adapter.installed, self._adapter.aside)

    @contextmanager
    def watch(
        self, question: Question, callback: Callable[[LayerStats], None], stage: str = "before"
    ) -> Iterator[None]:
        """Hands each layer's statistics to `callback` as they come and keeps nothing.

        What scans are built on.

        Args:
            question: the statistics wanted.
            callback: called with a `LayerStats` for each attention call.
            stage: "before" edits (the model's own weights) or "after".

        Example:
            >>> from interp_hooks import Question
            >>> layers, question = [], Question(frozenset({"entropy"}))
            >>> with model.watch(question, lambda stats: layers.append(stats.site.layer)):
            ...     _ = model.logits(torch.arange(8)[None])
            >>> layers
            [0, 1, 2, 3]
        """
        with self._block([Observer(question, callback, stage)]):
            yield

    @contextmanager
    def observe(
        self,
        *names: str,
        labels: torch.Tensor | None = None,
        reduce: str = "none",
        stage: str = "before",
        pairs: Mapping[str, torch.Tensor] | None = None,
        received: Mapping[str, Received] | None = None,
        cap: int = 10,
        topk: int = 8,
    ) -> Iterator[Recording]:
        """Records statistics of the attention weights in a block, in O(L) memory.

        Args:
            names: any of entropy, max, argmax, distance, capped_distance, group_mass, received,
                pair_mass, topk, value_norm, key_mass, gate. Row statistics come as (batch, heads,
                queries) float32; entropy in nats; `received` as (batch, heads, keys), mean over the
                queries that see the key; `key_mass` is Σ_k A, below 1 where a learned sink takes a
                share; `gate`, where heads are gated before W_O, is the mean over its dimensions.
            labels: (batch, keys) int groups for group_mass, negative for none, at most 16 groups.
            reduce: "none", "mean" (over queries: (batch, heads)) or "histogram" (counts, (batch,
                heads, bins)).
            stage: "before" edits (the model's own weights) or "after".
            pairs: name → (batch, queries or 1, m) key positions for `pair_mass`, −1 for none.
            received: name → `Received` (query set, band), read with
                `seen[layer].received_by(name)`.
            cap: for capped_distance, in tokens.
            topk: for topk, how many keys.

        Under `generate` what is asked of a sample is asked of each of its rows (beams,
        `num_return_sequences`), and rows after a text's end are not real: statistics 0, left out of
        means, counts and `received`. With beams a step's row is of the text that stood in that beam
        then; `beam_indices` of generate's output tells which rows are of a returned text.

        Returns:
            A `Recording`, filled while the model runs: `seen[layer].entropy`.

        Raises:
            TapError: an unknown name, reducer or stage; in the block, what is asked of other
                samples than run, forwards of several batch sizes, assisted decoding (rejected
                drafts), or another thread.

        Example:
            >>> with model.observe("entropy", "received", reduce="mean") as seen:
            ...     _ = model.logits(torch.arange(8)[None])
            >>> seen[2].entropy.shape, seen[2].received.shape
            (torch.Size([1, 8]), torch.Size([1, 8, 8]))
        """
        unknown = [n for n in names if n not in NAMES]
        if unknown:
            raise TapError(
                f"There is no statistic {unknown[0]!r}; observe knows {', '.join(NAMES)}."
            )
        if reduce not in ("none", "mean", "histogram") or stage not in ("before", "after"):
            raise TapError(
                "reduce is 'none', 'mean' or 'histogram', and stage is 'before' or 'after'."
            )
        if "gate" in names and not any(site.output_gate for site in self.sites):
            raise TapError(f"{self.name} has no output gate on its heads, so there is none to see.")
        if "group_mass" in names and labels is None:
            raise TapError(
                "group_mass needs labels=, a (batch, keys) integer tensor of key groups."
            )
        sets = dict(received or {})
        if "received" in names:
            sets["all"] = Received()
        groups = int(labels.max()) + 1 if labels is not None else 0
        statistics = frozenset(names) - {"received", "pair_mass", "topk"}
        question = Question(
            statistics, pairs or {}, sets, labels, groups, cap, topk if "topk" in names else 0
        )
        recording = Recording(question, reduce, stage)
        with self.watch(question, recording.add, stage):
            yield recording

    @contextmanager
    def capture_z(self) -> Iterator[dict[int | tuple[str, int], torch.Tensor]]:
        """Records the output z of every head in a block, before W_O, after edits.

        Returns:
            layer → (batch, queries, heads, d_head), appended along queries over forwards; the
            layers of other towers are (tower, layer).

        Example:
            >>> with model.capture_z() as z:
            ...     _ = model.logits(torch.arange(8)[None])
            >>> z[2].shape
            torch.Size([1, 8, 8, 32])
        """
        store: dict[Any, torch.Tensor] = {}

        def note(stats: LayerStats) -> None:
            site = stats.site
            key = site.layer if site.is_main else (site.tower or site.kind, site.layer)
            assert stats.z is not None
            store[key] = torch.cat([store[key], stats.z], 1) if key in store else stats.z

        with self.watch(Question(z=True), note):
            yield store

    @contextmanager
    def capture_resid(self, write: Hook | None = None) -> Iterator[Residual]:
        """Records the residual stream in a block, and replaces it where asked.

        Args:
            write: `write(place, layer, tensor)` may return a replacement.

        Returns:
            A `Residual`: resid["pre", l], ["mid", l], ["post", l] (batch, queries, d_model),
            resid["final"]. ["mid", l] is absent in parallel-attention blocks.

        Example:
            >>> with model.capture_resid() as resid:
            ...     _ = model.logits(torch.arange(8)[None])
            >>> bool((resid["post", 0] == resid["pre", 1]).all())
            True
        """
        with self._adapter.residual(write) as residual:
            yield residual

    @contextmanager
    def activations(self, *keep: str, write: Hook | None = None) -> Iterator[Activations]:
        """The tensors that flow between heads in one forward, live: for patching and gradients.

        Of the main tower, in a forward without a cache.

        Args:
            keep: places whose tensors are wanted: q, k, v, z, pre, mid, post, final
                (`interp_hooks.activations.PLACES`). They come as activations[place, layer], and
                `torch.autograd.grad` with respect to them is all that comes after.
            write: `write(place, layer, tensor)` may return a replacement, at every place, kept or
                not.

        Outer edits act before activations are read. Queries and keys are as the attention call has
        them: rotated, in HuggingFace models; TransformerLens shows them before rotation.

        Returns:
            The `Activations`, filled while the model runs.

        Raises:
            TapError: an unknown place, or a TransformerLens model without hook points for its
                projections.

        Example:
            >>> with model.activations("z") as kept:
            ...     logits = model.logits(torch.arange(8)[None])
            >>> grad, = torch.autograd.grad(logits[0, -1, 5], [kept["z", 2]])
            >>> grad.shape == kept["z", 2].shape
            True
        """
        activations = Activations()
        hook = noting(activations, keep, write)
        inside = self._adapter.calls_have_queries
        with (
            self._block(edits=[ReplaceActivations(hook, projections=inside)]),
            nullcontext() if inside else self._adapter.projections(hook),
            self._adapter.residual(hook, keep=False),
        ):
            yield activations

    @contextmanager
    def projections(self, hook: Hook) -> Iterator[None]:
        """Lets a hook read and replace q, k, v of the main tower as the projections give them.

        With biases, before norms of queries and keys, before rotation.

        Args:
            hook: `hook(place, layer, tensor)`, the tensor (batch, tokens, heads or kv_heads,
                d_head); what it returns, if anything, replaces the tensor.

        Raises:
            TapError: the projections are not known.

        Example:
            >>> shapes = {}
            >>> def note(place, layer, tensor):
            ...     shapes[place, layer] = tuple(tensor.shape)
            >>> with model.projections(note):
            ...     _ = model.logits(torch.arange(8)[None])
            >>> shapes["q", 0], shapes["k", 0]
            ((1, 8, 8, 32), (1, 8, 4, 32))
        """
        with self._adapter.projections(hook):
            yield

    def layer_outputs(self) -> AbstractContextManager[dict[Site, torch.Tensor]]:
        """What attention layers give in a forward of the block, site → tensor.

        Where that can be held against a layer's heads (for the check on load).
        """
        return self._adapter.outputs()

    def compare_output(self, site: Site, z: torch.Tensor, out: torch.Tensor, most: float) -> None:
        """Refuses the head weights of a layer whose output Σ_h z_h W_O,h + b_O is another one.

        That is, misses by more than `most` of its size (for the check on load).
        """
        self._adapter.compare_output(site, z, out, most)

    @contextmanager
    def resume(self, layer: int, output: Any) -> Iterator[None]:
        """Starts forwards at a layer of the main tower, from an earlier forward's output.

        No block before `layer` runs, and `output`, which the block just before gave in an earlier
        forward of the same inputs, is taken for theirs (see `block_outputs`).

        Args:
            layer: the first that runs.
            output: of the block before it, in the library's own form.

        Example:
            >>> ids = torch.arange(8)[None]
            >>> with model.block_outputs() as outputs:
            ...     own = model.logits(ids)
            >>> with model.resume(2, outputs[1]):
            ...     bool((model.logits(ids) == own).all())
            True
        """
        with eagerly(), skipping(self._adapter.blocks(), layer, output):
            yield

    @contextmanager
    def block_outputs(self) -> Iterator[dict[int, Any]]:
        """Records what each block of the main tower gives, for `resume`.

        Returns:
            layer → the block's output in one forward, in the library's own form.

        Example:
            >>> with model.block_outputs() as outputs:
            ...     _ = model.logits(torch.arange(8)[None])
            >>> sorted(outputs)
            [0, 1, 2, 3]
        """
        by_layer: dict[int, Any] = {}
        with eagerly(), ExitStack() as stack:
            for layer, block in self._adapter.blocks().items():

                def note(module: Any, args: tuple, output: Any, layer: int = layer) -> None:
                    by_layer[layer] = output

                stack.callback(block.register_forward_hook(note).remove)
            yield by_layer

    @contextmanager
    def edit(self, *edits: Edit | LiveEdit) -> Iterator[None]:
        """Applies edits in a block, left to right, inside those of outer blocks.

        Blocks of other handles on the same module are outer blocks too. Everything is undone on
        exit. Changes of logits (temperatures, biases) all come before changes of weights, whatever
        their order.

        Args:
            edits: of `interp.edits`, or one's own.

        Raises:
            EditError, HeadError: an edit that cannot apply to this model.

        Example:
            >>> ids = torch.arange(8)[None]
            >>> own = model.logits(ids)
            >>> with model.edit(interp.edits.Ablate(["L2H3"])):
            ...     edited = model.logits(ids)
            >>> bool((edited == own).all()), bool((model.logits(ids) == own).all())
            (False, True)
        """
        with self._block(edits=_edits(edits)):
            yield

    def explain(self, *edits: Edit | LiveEdit, tokens: int = 128) -> str:
        """The route that each layer takes under edits, and why, as text.

        Seen in a forward of `tokens` tokens and a decode step (for a sliding window, ask with more
        tokens than it holds).

        Args:
            edits: on top of those of this block.
            tokens: of the forward.

        Raises:
            EditError, HeadError: an edit that cannot apply to this model.

        Example:
            >>> print(model.explain(interp.edits.Ablate(["L2H3"])).splitlines()[0])
            self layers 0–1: untouched weights
        """
        count = whole(tokens)
        if count is None or count < 1:
            raise InputError(f"tokens= of explain counts tokens, from 1, not {quoted(tokens)}.")
        bound = [(edit, edit.bind(self)) for edit in _edits(edits)]
        active = [one for edit, one in bound if not edit.is_identity()]
        self._tap.check_thread()
        tap = Tap([], [*self._tap.edits, *active], self.backend)
        return self._adapter.explain(tap, tokens)

    def head_weights(self, layer: int, tower: str = "") -> HeadWeights:
        """W_Q, W_K, W_V and W_O of a layer by query head, GQA mapped.

        Args:
            layer: from 0.
            tower: "" for the main one.

        Returns:
            `HeadWeights`: W_Q, W_K, W_V (heads, d_model, d_head) and W_O (heads, d_head, d_model).

        Raises:
            TapError: the model's projections are not understood or failed the load-time check.
            HeadError: no such layer.

        Example:
            >>> weights = model.head_weights(2)
            >>> weights.W_Q.shape, weights.W_O.shape
            (torch.Size([8, 128, 32]), torch.Size([8, 32, 128]))
        """
        for site in self.sites:
            if site.layer == layer and site.tower == tower and site.kind == "self":
                return self._adapter.head_weights(site)
        layers = [s.layer for s in self.sites if s.tower == tower and s.kind == "self"]
        if not layers:
            towers = ", ".join(filter(None, self.towers)) or "only one, without a name"
            raise HeadError(f"{self.name} has no tower {tower!r}; it has {towers}.")
        raise HeadError(f"{self.name} has no such heads: {no_attention(layer, layers)}.")

    def output_projection(self, site: Site) -> torch.nn.Module:
        """The module of the model that is W_O of a site, as the check on load proved it.

        Args:
            site: one of `sites`.

        Raises:
            TapError: none is known: another library's model, an output that was refused.

        Example:
            >>> model.output_projection(model.sites[0])
            Linear(in_features=256, out_features=128, bias=False)
        """
        return self._adapter.output_projection(site)

    def vocabulary(self) -> Vocabulary:
        """W_E, W_U and b_U of the main tower with their scales, checked in a short forward.

        Raises:
            TapError: the model has no unembedding, or does more between stream and tokens than
                these say.

        Example:
            >>> vocabulary = model.vocabulary()
            >>> vocabulary.W_E.shape[1] == vocabulary.W_U.shape[0]
            True
        """
        return read_vocabulary(
            self.name, self._adapter.embeddings(), self.short_rows(), self._forward
        )

    def _forward(self, ids: torch.Tensor) -> Forward:
        """Logits and residual stream of the model as it is."""
        with self.clean(), self.capture_resid() as resid:
            return self.logits(ids), resid

    def norms(self) -> Norms:
        """The norms around each attention of the main tower, and the final one.

        Each by its gain, its centring, and as a linear map with its scale frozen at an input.

        Raises:
            TapError: when one is asked for, where it is no RMS or layer norm.

        Example:
            >>> norms = model.norms()
            >>> norms.final().gain.shape
            torch.Size([128])
        """
        with self.clean():
            return self._adapter.norms(self.short_rows())

    def short_rows(self, tokens: int = TOKENS) -> torch.Tensor:
        """(2, tokens) ids that stand for words, different in every column: to hold one way of
        running the model against another.

        Args:
            tokens: of a row.

        Raises:
            TapError: the model has no embedding of tokens.

        Example:
            >>> model.short_rows(4).shape
            torch.Size([2, 4])
        """
        size = self._adapter.embeddings().W_E.shape[0]
        ids = torch.arange(2 * tokens, device=self.device).reshape(2, tokens) * 37 % size
        return self._adapter.ordinary(ids)

    def observers_and_edits(self) -> tuple[list[Observer], list[CallEdit]]:
        """The observers and edits that are active now, inside the blocks that are open."""
        return self._tap.observers, self._tap.edits


def _edits(given: Sequence[Any]) -> Sequence[Edit | LiveEdit]:
    """The same; raises `EditError` for what is no edit."""
    for one in given:
        if isinstance(one, (list, tuple)):
            raise EditError(
                "Edits come one by one, not as a list: model.edit(*edits), model.explain(*edits)."
            )
        checked_edit(one)
    return given
