"""Which attentions a model has, found by running it, and what each is called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from interp_hooks.call import STREAMS, AttentionCall, Site
from interp_hooks.engine import Tap, attend
from interp_hooks.errors import InterpError, TapError
from interp_hooks.huggingface.called import ModuleStack
from interp_hooks.huggingface.layout import Layout, text_config
from interp_hooks.huggingface.output_gate import Between, Probe
from interp_hooks.huggingface.tap import installed


@dataclass(frozen=True)
class Found:
    """An attention that was called.

    Attributes:
        path: of its module, on which it was called.
        module: the attention module.
        call: as it came.
        turn: how many forwards of the module went before in the same forward of the model.
        between: what stands between its heads and W_O, None for nothing.
        stream: 0, or of the streams that a module attends with beside its main one the number
            (ProphetNet's n-grams: all of them in one attention, 1).
    """

    path: str
    module: torch.nn.Module
    call: AttentionCall
    turn: int = 0
    between: Between | None = None
    stream: int = 0


def interface_calls(model: Any, run: Callable[[], Any], layout: Layout) -> list[Found]:
    """Every attention call that `run` makes by transformers' AttentionInterface, in order;
    attention is computed plainly. Raises `TapError` where there is none."""
    if not model._can_set_attn_implementation():
        raise TapError(
            f"{type(model).__name__} does not use transformers' AttentionInterface. (transformers "
            "reads the class's file to tell: a class of your own must stand in one, and get its "
            "attention by ALL_ATTENTION_FUNCTIONS.get_interface.)"
        )
    calls: dict[tuple[int, int], Found] = {}
    probe, stack = Probe(layout), ModuleStack(model)
    queries: dict[tuple[int, int], torch.Tensor] = {}  # of the last call in this forward

    def note(module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        key = id(module), stack.turn(module)
        before = queries.get(key)
        if before is not None and call.query is not None and before.shape == call.query.shape:
            _refuse_twice(module, bool((before == call.query).all()))
        if call.query is not None:
            queries[key] = call.query
        calls.setdefault(key, Found(stack.path(module), module, call, key[1]))
        return probe.attended(module, attend(call, Tap()), key[1])

    live = {id(m): (None, note) for m in model.modules()}
    with installed(model, live, over=True), probe, stack:
        run()
        if probe.again():  # a second forward tells gates from norms
            stack.restart()
            queries.clear()
            run()
    if not calls:
        raise TapError(
            f"No layer of {type(model).__name__} made an attention call through transformers' "
            "AttentionInterface."
        )
    return [replace(f, between=probe.between(f.module, f.turn)) for f in calls.values()]


def _refuse_twice(module: torch.nn.Module, same: bool) -> None:
    """Raise `TapError` where one forward of a module attends twice with the same queries. (Windows
    of a picture are several calls with queries of their own.)"""
    if same:
        raise TapError(
            f"{type(module).__name__} attends twice with the same queries, on parts of its values "
            "(differential attention), so a head has no one output and the model can't be tapped."
        )


def sites(model: Any, calls: Sequence[Found], layout: Layout) -> list[tuple[Site, Found]]:
    """A site for each attention, numbered as the model numbers its layers. Raises `TapError` naming
    a layer that should have attention and made no call."""
    two_stacks = bool(getattr(model.config, "is_encoder_decoder", False))
    shared = {id(f.module) for f in calls if f.turn}
    placed = [_placed(f, two_stacks, id(f.module) in shared, layout) for f in calls]
    placed = _separate(_named_towers(placed, layout), layout)
    _check_missing(model, placed)
    found = [
        (replace(site, output_gate=f.between is not None and f.between.gate), f)
        for site, f in zip(placed, calls, strict=True)
    ]
    return [(replace(s, learned_sinks=f.call.sinks is not None), f) for s, f in found]


#: the layer of a site that is yet to be counted
UNNUMBERED = -1


def _placed(f: Found, two_stacks: bool, shared: bool, layout: Layout) -> Site:
    """A site as its module's own number and path say."""
    kind = "cross" if layout.named(f.path, "cross") else "self"
    inside = _in_encoder(f.path, layout)
    layer, tower = getattr(f.module, "layer_idx", None), ""
    if shared or not isinstance(layer, int) or layer < 0:
        layer = None
    if two_stacks and inside:
        layer, tower = None, "encoder"
    elif layer is None and not two_stacks and not (shared and not layout.named(f.path, "vision")):
        # vision towers and encoders number nothing, or start from 0 as the decoder does
        tower = "vision" if layout.named(f.path, "vision") else "encoder"
    size = f.call.site
    if f.stream:
        tower = STREAMS
    layer = UNNUMBERED if layer is None else layer
    return Site(tower, layer, kind, f.path, size.n_heads, size.n_kv_heads, size.d_head)


def _in_encoder(path: str, layout: Layout) -> bool:
    """Whether a path goes through an encoder before it goes through a decoder: "text_encoder.…",
    not "decoder.bert.encoder.…" (BERT as a decoder)."""
    for part in path.split("."):
        if part == "decoder" or part.endswith("_decoder"):
            return False
        if any(part == name or part.endswith(f"_{name}") for name in layout.names("encoder")):
            return True
    return False


def _named_towers(placed: list[Site], layout: Layout) -> list[Site]:
    """The same, with a single tower called "", and "text" what stands beside a vision tower."""
    towers = {site.tower for site in placed}
    if len(towers) == 1 and "" not in towers:  # an encoder alone is the only tower
        return [replace(site, tower="") for site in placed]
    if "vision" in towers:
        if "" not in towers:  # two encoders (CLIP)
            return [replace(s, tower="text" if s.tower == "encoder" else s.tower) for s in placed]
        return [replace(site, tower=site.tower or "text") for site in placed]
    return placed


def _separate(placed: list[Site], layout: Layout) -> list[Site]:
    """The same without two sites of one name: stacks that number alike become towers of their own;
    a tower of which some layer has no number, or shares it, is numbered as its blocks stand in
    their list, or else in order of calls."""
    if _clashes(placed):
        main = next((s for s in placed if s.tower in ("", "text")), placed[0])
        stack = _stack(main.path)
        placed = [
            replace(s, tower=_tower(s.path, layout))
            if s.tower in ("", "text") and _stack(s.path) != stack
            else s
            for s in placed
        ]
    clashing = {key[:2] for key in _clashes(placed)}
    numbers: dict[tuple[str, str], Iterator[int]] = {}
    for key in {(s.tower, s.kind) for s in placed}:
        own = [s for s in placed if (s.tower, s.kind) == key]
        if key in clashing or any(s.layer == UNNUMBERED for s in own):
            by_path = [_number(s.path) for s in own]
            told = len(set(by_path)) == len(own) and min(by_path) >= 0
            numbers[key] = iter(by_path if told else range(len(own)))
    return [
        replace(s, layer=next(numbers[s.tower, s.kind])) if (s.tower, s.kind) in numbers else s
        for s in placed
    ]


def _number(path: str) -> int:
    """The first number in a path, −1 without."""
    number = re.search(r"\.(\d+)(?:\.|$)", path)
    return int(number[1]) if number else -1


def _clashes(placed: Sequence[Site]) -> set[tuple[str, str, int]]:
    counts = Counter((s.tower, s.kind, s.layer) for s in placed if s.layer != UNNUMBERED)
    return {key for key, n in counts.items() if n > 1}


def _stack(path: str) -> str:
    """What stands before the first number of a path: the list of blocks."""
    return re.split(r"\.\d+(?:\.|$)", path)[0]


def _tower(path: str, layout: Layout) -> str:
    """The name of a further stack: the first part of its path that says something."""
    parts = [p for p in _stack(path).split(".") if p not in ("model", "layers", "layer", "blocks")]
    return "vision" if layout.named(path, "vision") else parts[0] if parts else "other"


def expected_layers(model: Any) -> list[int] | None:
    """The decoder layers that should have attention: all but those the config calls linear,
    recurrent or conv; None where it does not say."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not isinstance(kinds, (list, tuple)):
        return None
    return [
        i
        for i, kind in enumerate(map(str, kinds))
        if ("attention" in kind and "linear" not in kind) or kind == "hybrid"
    ]


def _check_missing(model: Any, placed: Sequence[Site]) -> None:
    """Raise `TapError` for a block without an attention call that should have made one: by the
    config, or because it has a module that is called an attention."""
    main = [s for s in placed if s.tower in ("", "text") and s.kind == "self"]
    if not main:
        return
    expected = expected_layers(model)
    # in Mllama some layers have cross-attention alone
    crossing = set(getattr(text_config(model), "cross_attention_layers", None) or ())
    if expected is None:
        path = _stack(main[0].path)
        blocks = dict(model.named_modules()).get(path)
        fired = {s.path.removeprefix(path + ".").split(".")[0] for s in main}
        names = [] if blocks is None else [n for n, _ in blocks.named_children() if n.isdigit()]
        quiet = [n for n in names if n not in fired and _has_attention(blocks, n)]
        missing = [int(n) for n in quiet if int(n) not in crossing]
    else:
        fired_layers = {s.layer for s in main}
        missing = [layer for layer in expected if layer not in fired_layers]
    if missing:
        raise TapError(
            f"Layer {missing[0]} of {type(model).__name__} made no attention call that can be "
            f"tapped ({len(missing)} such layers), so the model is refused."
        )


def _has_attention(blocks: Any, name: str) -> bool:
    modules = blocks.get_submodule(name).modules()
    return any(re.search("attention|attn", type(m).__name__, re.IGNORECASE) for m in modules)


def attempt(model: Any, run: Callable[[], Any]) -> Any:
    """What `run` gives. What the model's own code raises becomes a `TapError` of one sentence that
    names it; errors of this toolkit's pass."""
    try:
        return run()
    except InterpError:
        raise
    except Exception as error:  # an architecture's code may raise anything
        raise TapError(
            f"{type(model).__name__} does not run with the tap in place, so it is refused "
            f"({one_line(error)})."
        ) from error


def one_line(error: BaseException) -> str:
    """An error's type and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[0][:197] + "…" if len(lines[0]) > 200 else lines[0]) if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def refuse_bridged(model: Any) -> None:
    """TransformerLens swaps attention modules inside the model it boots; a registered function
    never fires there."""
    for module in model.modules():
        if type(module).__module__.startswith("transformer_lens."):
            raise TapError(
                "This HuggingFace model was booted into a TransformerBridge, which replaced its "
                "attention modules; "
                "pass the bridge itself to interp.load, or load the HuggingFace model afresh."
            )
