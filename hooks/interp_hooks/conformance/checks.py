"""One model against its own eager attention: what is compared, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from interp_hooks.call import Site
from interp_hooks.conformance import reference
from interp_hooks.conformance.edits import AtSite, Calibrated, Gain, Initial
from interp_hooks.conformance.reference import (
    Eager,
    Untouched,
    eagerly,
    heads_read,
    leaves_sink_out,
    reading,
    recorded,
    with_attentions,
)
from interp_hooks.conformance.values import value_error
from interp_hooks.errors import InterpError, TapError
from interp_hooks.logits import logits_of
from interp_hooks.model import HookedModel
from interp_hooks.question import Question
from interp_hooks.verify import TOLERANCE
from interp_kernels import Received

#: row statistics that every site is asked for
ROWS = ("entropy", "max", "key_mass", "distance")
#: largest difference of a weight, and of an entropy or a distance, relative to 1 + its size
WEIGHT, SUM = 2e-4, 1e-3

Status = Literal["equal", "wrong", "refused", "unavailable"]


@dataclass(frozen=True)
class Outcome:
    """What one comparison gave.

    Attributes:
        mode: plain, padded, decode, generate or static.
        check: what was compared.
        status: equal; wrong; refused by the toolkit with a sentence; unavailable where the
            untouched model itself can't, or gives nothing to compare with.
        detail: the difference, or the sentence.
    """

    mode: str
    check: str
    status: Status
    detail: str = ""


def key_of(site: Site) -> Any:
    """How recordings name a site."""
    return site.layer if site.is_main else (site.tower or site.kind, site.layer)


class Comparison:
    """One model, compared mode by mode; `outcomes` collects what came of it.

    Args:
        model: as loaded.
        inputs: a batch of at least 8 tokens, without padding.
        padded: the same with padding, or None where the model takes no mask.
    """

    def __init__(
        self, model: HookedModel, inputs: dict[str, Any], padded: dict[str, Any] | None = None
    ):
        self.model, self.inputs, self.padded = model, inputs, padded
        self.outcomes: list[Outcome] = []
        dtype = next(model.module.parameters()).dtype
        #: of logits and outputs, relative to their largest
        self.allowed = TOLERANCE.get(dtype, 2e-2)
        wide = {torch.float16: 50.0, torch.bfloat16: 200.0}.get(dtype, 1.0)
        self.weight, self.sum = WEIGHT * wide, SUM * wide

    def run(self) -> list[Outcome]:
        """Every comparison; a fault of the untouched model makes its mode unavailable."""
        self._tried("plain", lambda: self.forward("plain", self.inputs))
        self._tried("plain", lambda: self.edited("plain", self.inputs))
        self._tried("plain", self.weights)
        padded = self.padded
        if padded is not None:
            self._tried("padded", lambda: self.forward("padded", padded))
            self._tried("padded", lambda: self.edited("padded", padded))
        if self.model.has_cache and "input_ids" in self.inputs and self._decoder_only():
            self._tried("decode", self.decode)
        if hasattr(self.model.module, "generate") and self.model.module.can_generate():
            self._tried("generate", lambda: self.generate("generate"))
            static = getattr(self.model.module, "_can_compile_fullgraph", False)
            if self.model.has_cache and static:
                how = dict(cache_implementation="static", disable_compile=True)
                self._tried("static", lambda: self.generate("static", **how))
        return self.outcomes

    def _decoder_only(self) -> bool:
        return not getattr(self.model.module.config, "is_encoder_decoder", False)

    def _tried(self, mode: str, what: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                what()
        except InterpError as error:
            self.outcomes.append(Outcome(mode, "run", "refused", str(error)))
        except Untouched as error:
            self.outcomes.append(Outcome(mode, "run", "unavailable", str(error)))

    def note(self, mode: str, check: str, error: float, allowed: float) -> None:
        """Adds what a difference means."""
        right = error <= allowed
        self.outcomes.append(Outcome(mode, check, "equal" if right else "wrong", f"{error:.1e}"))

    # the untouched model, run by its handle outside any block: under padding, that is what counts
    # learned positions from the mask

    def eager(self, what: Callable[[], Any]) -> Eager:
        """What the untouched model does under eager attention; raises `Untouched`."""
        module = self.model.module
        with eagerly(module), recorded(module, self.model.sites, self._output) as eager:
            try:
                eager.out = what()
            except Untouched:
                raise
            except Exception as error:  # whatever its own code raises, it isn't the tap's doing
                text = str(error).split("\n")[0][:120]
                raise Untouched(f"untouched: {type(error).__name__}: {text}") from error
        return eager

    def _output(self, site: Site) -> Any:
        """W_O's module at a site: by its name, or as the check on load found it; None where
        neither knows it."""
        adapter: Any = self.model._adapter
        attention = self.model.module.get_submodule(site.path)
        named = adapter._layout.find(attention, "output_projection")
        found = getattr(adapter.parts.get(site, {}).get("z"), "projection", None)
        return named if found is None else found

    # modes

    def forward(self, mode: str, inputs: dict[str, Any]) -> None:
        """One forward: logits, every statistic of every site, z."""
        module = self.model.module
        eager = self.eager(lambda: self.model(**with_attentions(module, inputs)))
        names, received = set(ROWS), {"sum": Received(reduce="sum")}
        gated = any(s.output_gate for s in self.model.sites)
        names |= {"topk", "argmax"}
        observed = self.model.observe(*names, received=received, topk=3)
        with observed as seen, self.model.capture_z() as z:
            out = self.model(**inputs)
        self.logits(mode, eager.out, out, inputs)
        self._put_sinks_in(eager, inputs)
        for site in self.model.sites:
            rows = self.rows(site, inputs, mode)
            mine, patterns = seen[key_of(site)], eager.patterns[site]
            name = str(key_of(site))
            keys = mine.received_by("sum").shape[-1]
            if len(patterns) != 1 or patterns[0].shape[-1] != keys:
                gave = "no weights" if not patterns else f"{len(patterns)} patterns"
                if (
                    len(patterns) == 1
                ):  # T5Gemma 2 attends to both texts at once, and hands over one
                    gave = f"weights over {patterns[0].shape[-1]} of {keys} keys"
                self.outcomes.append(Outcome(mode, f"statistics {name}", "unavailable", gave))
            else:
                self.compare(mode, name, site, mine, patterns[0], rows)
            reads = eager.reads[site]
            if len(reads) == 1 and reads[0].numel() == z[key_of(site)].numel():
                ours = z[key_of(site)].flatten(-2).reshape(reads[0].shape)
                size = float(reads[0].abs().max().clamp_min(1e-6))
                keep = (
                    rows if rows is not None and rows.shape == reads[0].shape[:2] else slice(None)
                )
                error = float((ours - reads[0])[keep].abs().max()) / size
                self.note(mode, f"z {name}{' gated' * gated}", error, self.allowed)

    def _put_sinks_in(self, eager: Eager, inputs: dict[str, Any]) -> None:
        """Completes weights that leave out the share of a learned sink."""
        bare = [
            site
            for site in self.model.sites
            if site.learned_sinks and len(eager.patterns[site]) == len(eager.reads[site]) == 1
            if leaves_sink_out(eager.patterns[site][0])
        ]
        if not bare:
            return
        values: dict[Site, Tensor] = {}

        def keep(stats: Any) -> None:
            values[stats.site] = stats.call.value

        with self.model.watch(Question(call=True), keep):
            self.model(**inputs)
        for site in bare:
            every = site.n_heads // site.n_kv_heads
            value = values[site].repeat_interleave(every, 1)
            whole = reference.with_factor(eager.patterns[site][0], value, eager.reads[site][0])
            eager.patterns[site] = [whole]

    def compare(
        self, mode: str, name: str, site: Site, mine: Any, pattern: Tensor, rows: Tensor | None
    ) -> None:
        """A site's statistics against its eager pattern, on real rows."""
        if rows is None:
            rows = torch.ones(pattern.shape[0], pattern.shape[2], dtype=torch.bool)
        if rows.shape != (pattern.shape[0], pattern.shape[2]):  # CPM-Ant puts a prompt before them
            why = f"{pattern.shape[2]} rows for {rows.shape[1]} tokens"
            self.outcomes.append(Outcome(mode, f"statistics {name}", "unavailable", why))
            return
        if mine.queries.shape != rows.shape:  # several pictures, one after the other
            why = f"{tuple(mine.queries.shape)} rows for eager weights of {tuple(rows.shape)}"
            self.outcomes.append(Outcome(mode, f"statistics {name}", "unavailable", why))
            return
        if not bool((mine.queries.cpu() == rows.cpu()).all()):
            self.outcomes.append(
                Outcome(mode, f"real rows {name}", "wrong", f"{int(mine.queries.sum())} rows")
            )
        apart = site.kind == "cross" or pattern.shape[2] != pattern.shape[3]
        expected = reference.statistics(pattern, apart)
        real = rows[:, None].expand(pattern.shape[:3])
        for what, value in expected.items():
            ours = getattr(mine, what).double().cpu()
            error = ((ours - value).abs() / (1 + value.abs()))[real]
            most = self.weight if what in ("max", "key_mass") else self.sum
            self.note(mode, f"{what} {name}", float(error.max()), most)
        best = mine.argmax.long().clamp_min(0)[..., None]
        error = (pattern.amax(-1) - pattern.gather(-1, best)[..., 0])[real]
        self.note(mode, f"argmax {name}", float(error.max()), self.weight)
        k = min(3, pattern.shape[-1])
        error = (mine.topk_prob[..., :k].double() - pattern.topk(k).values)[real].abs()
        self.note(mode, f"topk {name}", float(error.max()), self.weight)
        total = torch.where(real[..., None], pattern, 0).sum(-2)
        error = (mine.received_by("sum").double() - total).abs() / (1 + total)
        self.note(mode, f"received {name}", float(error.max()), self.sum)

    def logits(self, mode: str, eager: Any, ours: Any, inputs: dict[str, Any]) -> None:
        """The model's answers on real rows."""
        want, got = logits_of(eager).float(), logits_of(ours).float()
        keep = self.decoder_rows(inputs, mode)
        if keep is None or want.ndim != 3 or keep.shape != want.shape[:2]:
            keep = torch.ones(want.shape[:1], dtype=torch.bool)
        error = float((want - got)[keep].abs().max() / want[keep].abs().max().clamp_min(1e-6))
        self.note(mode, "logits", error, self.allowed)

    def decoder_rows(self, inputs: dict[str, Any], mode: str) -> Tensor | None:
        """Which rows of the answers are real; None for all."""
        encoder_decoder = not self._decoder_only()
        mask = inputs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
        return None if mask is None or mask.ndim != 2 else mask.bool()

    def rows(self, site: Site, inputs: dict[str, Any], mode: str) -> Tensor | None:
        """Which query rows of a site are real; None for all."""
        if self._decoder_only() and site.is_main:
            return self.decoder_rows(inputs, mode)
        if site.tower == "encoder" and "input_ids" in inputs:
            mask = inputs.get("attention_mask")
            return None if mask is None else mask.bool()
        return self.decoder_rows(inputs, mode) if site.is_main or site.kind == "cross" else None

    def edited(self, mode: str, inputs: dict[str, Any]) -> None:
        """A gain, ZeroTuning and ACT at the middle site, against eager weights changed by their
        formulas and put into W_O's place."""
        mains = [s for s in self.model.sites if s.is_main]
        if not mains:
            return
        site = mains[len(mains) // 2]
        if self._output(site) is None:
            self.outcomes.append(Outcome(mode, "edits", "unavailable", "W_O is not known"))
            return
        module = self.model.module
        eager = self.eager(lambda: self.model(**with_attentions(module, inputs)))
        reads = eager.reads[site]
        if len(reads) != 1:
            self.outcomes.append(Outcome(mode, "edits", "unavailable", f"{len(reads)} W_O reads"))
            return
        head = site.n_heads - 1
        z = reads[0].clone().unflatten(-1, (site.n_heads, -1))
        z[..., head, :] *= 0.25
        self._arrives(mode, "gain", Gain(site, head=head), z.flatten(-2), inputs)
        square = len(eager.patterns[site]) == 1
        square = square and eager.patterns[site][0].shape[-1] == eager.patterns[site][0].shape[-2]
        if site.output_gate or not square:
            why = "gated heads" if site.output_gate else "no eager weights from all tokens to all"
            self.outcomes.append(Outcome(mode, "rules", "unavailable", why))
            return
        values: list[Tensor] = []

        def note(stats: Any) -> None:
            if stats.site == site:
                values.append(stats.call.value)

        with self.model.watch(Question(call=True), note):
            self.model(**inputs)
        value = values[0].double()
        if value.shape[2] != eager.patterns[site][0].shape[-1]:
            why = "its eager weights are of some of its keys"
            self.outcomes.append(Outcome(mode, "rules", "unavailable", why))
            return
        value = value.repeat_interleave(site.n_heads // value.shape[1], 1)
        self._put_sinks_in(eager, inputs)
        pattern = eager.patterns[site][0]
        own = (pattern @ value).transpose(1, 2).flatten(-2)
        scale = float(reads[0].abs().max().clamp_min(1e-6))
        rows = self.rows(site, inputs, mode)
        keep = rows if rows is not None and rows.shape == own.shape[:2] else slice(None)
        if (
            own.numel() != reads[0].numel()
            or float((own - reads[0].reshape(own.shape))[keep].abs().max())
            > 10 * self.allowed * scale
        ):
            self.outcomes.append(
                Outcome(mode, "rules", "unavailable", "z is more than its weights times values")
            )
            return
        real = rows
        if real is None or real.shape != pattern.shape[:1] + pattern.shape[-1:]:
            real = torch.ones(pattern.shape[0], pattern.shape[-1], dtype=torch.bool)
        first = real.int().argmax(-1)
        tuned = reference.zero_tuned(pattern, first, 4.0)
        self._arrives(mode, "ZeroTuning", Initial(site), heads_read(tuned, value, reads[0]), inputs)
        sinks = reference.act_sinks(pattern, real, 1.2)
        changed = reference.calibrated(pattern, sinks, 0.4)
        self._arrives(mode, "ACT", Calibrated(site), heads_read(changed, value, reads[0]), inputs)

    def _arrives(
        self, mode: str, what: str, edit: AtSite, z: Tensor, inputs: dict[str, Any]
    ) -> None:
        """The edited model against the eager one whose W_O reads z."""
        module = self.model.module
        before = [s for s in self.model.sites if s.path == edit.site.path].index(edit.site)
        with reading(self._output(edit.site), z, before):
            eager = self.eager(lambda: self.model(**with_attentions(module, inputs)))
        with self.model.edit(edit):
            out = self.model(**inputs)
        want, got = logits_of(eager.out).float(), logits_of(out).float()
        keep = self.decoder_rows(inputs, mode)
        if keep is None or want.ndim != 3 or keep.shape != want.shape[:2]:
            keep = torch.ones(want.shape[:1], dtype=torch.bool)
        error = float((want - got)[keep].abs().max() / want[keep].abs().max().clamp_min(1e-6))
        self.note(mode, what, error, 5 * self.allowed)

    def decode(self) -> None:
        """A cache: a prompt of all but four tokens, then one, one and two at once."""
        ids = self.inputs["input_ids"]
        n = ids.shape[1]
        parts = [slice(0, n - 4), slice(n - 4, n - 3), slice(n - 3, n - 2), slice(n - 2, n)]
        module = self.model.module

        def steps(run: Callable[..., Any]) -> Tensor:
            logits, cache = [], None
            for part in parts:
                given: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
                out = run(
                    **with_attentions(module, {"input_ids": ids[:, part]}), use_cache=True, **given
                )
                cache = getattr(out, "past_key_values", None)
                if cache is None:
                    raise Untouched("untouched: it returns no cache")
                logits.append(logits_of(out))
            return torch.cat(logits, 1)

        eager = self.eager(lambda: steps(module))
        with self.model.observe("entropy", "max") as seen:
            ours = steps(self.model)
        self.logits("decode", eager.out, ours, {})
        for site in self.model.sites:
            patterns, name = eager.patterns[site], f"statistics {key_of(site)}"
            if len(patterns) != len(parts):
                continue
            if site.learned_sinks and leaves_sink_out(patterns[0]):
                detail = "its weights leave out the sink"
                self.outcomes.append(Outcome("decode", name, "unavailable", detail))
                continue
            want = torch.cat([reference.statistics(p, False)["entropy"] for p in patterns], -1)
            got = seen[key_of(site)].entropy.double().cpu()
            if got.shape != want.shape:
                detail = f"{tuple(got.shape)} for {tuple(want.shape)}"
                self.outcomes.append(Outcome("decode", f"rows {key_of(site)}", "wrong", detail))
                continue
            error = float(((got - want).abs() / (1 + want)).max())
            self.note("decode", f"entropy {key_of(site)}", error, self.sum)

    def generate(self, mode: str, **how: Any) -> None:
        """Six greedy tokens."""
        module = self.model.module
        given = {k: v for k, v in self.inputs.items() if not k.startswith("decoder_")}
        how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **how)
        eager = self.eager(lambda: module.generate(**given, **how))
        with self.model.observe("entropy"):
            ours = self.model.generate(**given, **how)
        same = eager.out.shape == ours.shape and bool((eager.out == ours).all())
        self.outcomes.append(Outcome(mode, "tokens", "equal" if same else "wrong"))

    def weights(self) -> None:
        """Head weights: x W_V against the values of the call, z W_O against W_O's output."""
        for site in self.model.sites:
            name = str(key_of(site))
            try:
                weights = (
                    self.model.head_weights(site.layer, site.tower) if site.kind == "self" else None
                )
                if weights is not None:
                    _ = weights.W_V  # refused by name where values are no matrix
            except InterpError as error:
                self.outcomes.append(Outcome("plain", f"weights {name}", "refused", str(error)))
                continue
            if weights is None:
                continue
            difference = value_error(self.model, self.inputs, site, weights)
            if difference is None:
                self.outcomes.append(
                    Outcome("plain", f"W_V {name}", "unavailable", "its input is not known")
                )
            else:
                self.note("plain", f"W_V {name}", difference, 10 * self.allowed)


def check(model: HookedModel) -> list[Outcome]:
    """Every comparison of a loaded model with its own eager attention.

    Short inputs like those of the load-time check; for a text model 12 tokens in two rows, also
    with padding.

    Raises:
        TapError: a TransformerLens model, which has no eager attention to compare with.

    Example:
        >>> outcomes = check(model)
        >>> {outcome.status for outcome in outcomes} <= {"equal", "unavailable"}
        True
    """
    adapter: Any = model._adapter
    sample = getattr(adapter, "_sample", None)
    if sample is None:
        raise TapError(
            f"{model.name} is a TransformerLens model; only transformers models have an eager "
            "attention to compare with."
        )
    if "input_ids" not in sample or set(sample) - {"input_ids", "attention_mask"}:
        bare = {k: v for k, v in sample.items() if k != "attention_mask"}
        return Comparison(model, bare, sample if "attention_mask" in sample else None).run()
    size = model.module.get_input_embeddings().weight.shape[0]
    ids = ((torch.arange(24).reshape(2, 12) * 37 + 11) % size).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    padded = dict(input_ids=ids, attention_mask=mask) if "attention_mask" in model.accepts else None
    return Comparison(model, dict(input_ids=ids), padded).run()
