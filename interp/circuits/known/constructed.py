"""Models whose circuit is known by construction, all under one roof: compiled, planted, trained.

* compiled programs, exact (`compiled`): "reverse", "histogram", "sort", "frac_prevs";
* planted circuits (`planted`): "induction", "ioi"; and harder ones (`harder`): "superposed",
  "negative", "backup", "repair", "superposed_backup";
* trained to keep a program's variables (`trained`): "siit_ioi", "siit_pointer", "siit_induction",
  once `examples/train_siit.py` has trained them.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.circuits.known import compiled, harder, planted, trained
from interp.circuits.known.ends import Edge, parse_end
from interp.circuits.known.planted import Planted
from interp.circuits.known.truth import Truth
from interp.circuits.known.wiring import Wiring, superposed
from interp.circuits.known.words import tokenizer_of
from interp.errors import InputError, UnknownNameError
from interp.inputs.text import check_seed
from interp_hooks.heads import Head

if TYPE_CHECKING:
    from interp.circuits.known.drawn import DrawnTask

__all__ = ["get", "names"]


def names() -> list[str]:
    """Names of all constructed models.

    Example:
        >>> interp.circuits.constructed.names()[:4]
        ['reverse', 'histogram', 'sort', 'frac_prevs']
    """
    return [*compiled.TASKS, *planted.names(), *harder.TASKS, *trained.names()]


def get(name: str, seed: int = 0) -> Planted:
    """The constructed model called `name`: a model, its task, and the circuit as a `Truth`.

    Args:
        name: of `names()`.
        seed: draws which heads do the work, and all others; models that were trained are one each.

    Raises:
        UnknownNameError: there is none.
        InputError: a negative seed, or one but 0 for a trained model.

    Misleads:
        Heads outside a compiled circuit do exactly nothing, so that a method that finds any effect
        at all ranks perfectly: what it takes to tell weak heads from none is not asked. Circuits of
        real models overlap, and none is as sparse.

    Example:
        >>> made = interp.circuits.constructed.get("sort")
        >>> made.truth.classes()["count smaller"], made.truth.complete_edges
        ([L1H7], True)
    """
    check_seed(seed)
    if name in planted.names():
        return planted.get(name, seed)
    if name in trained.names():
        if seed:
            raise InputError(f"{name} was trained once; it has no seed but 0, not {seed}.")
        return _trained(name)
    tasks: dict[str, Any] = {**compiled.TASKS, **harder.TASKS}
    if name not in tasks:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names())}."
        raise UnknownNameError(f"There is no constructed model called {name!r}; {hint}")
    return _wired(tasks[name], seed)


def _wired(task: Any, seed: int) -> Planted:
    rng = np.random.default_rng([seed, *task.name.encode()])
    wiring: Wiring = task.wire(rng)
    wiring.distract()
    shared = getattr(task, "shared", False)
    prompts = torch.tensor([task.draw(rng) for _ in range(32)])
    module = wiring.build(superposed if shared else None)
    for _ in range(3):  # heads outside read each other
        wiring.level(module, prompts)
    varying, constant = wiring.edges()
    notes: tuple[str, ...] = (
        f"Heads outside attend and write as strongly ({len(wiring.others)} of them).",
    )
    if shared:
        notes += (
            "Features share dimensions, so heads and edges outside the circuit have small effects.",
        )
    return _made(
        task, module, dict(wiring.roles), varying, constant, f"constructed, seed {seed}", notes
    )


def _trained(name: str) -> Planted:
    task = trained.TASKS[name]
    program, reached = task.program, trained.reached(name)
    heads = {
        Head.parse(node): program.roles[variable]
        for variable, node in program.nodes.items()
        if variable in program.roles
    }
    varying, constant = (
        tuple((parse_end(a), parse_end(b), part) for a, b, part in edges)
        for edges in (program.edges, program.constant_edges)
    )
    notes = (
        f"Over {reached['n']:,} held-out pairs interchange accuracy is "
        f"{min(reached['interchange'].values()):.4f} or more, and swapping a node outside changes "
        f"the probability of a token by {max(reached['inert'].values()):.2g} at most.",
    )
    source = "trained, examples/train_siit.py"
    return _made(task, trained.module_of(name), heads, varying, constant, source, notes)


def _made(
    task: DrawnTask,
    module: Any,
    heads: dict[Head, str],
    varying: tuple[Edge, ...],
    constant: tuple[Edge, ...],
    source: str,
    notes: tuple[str, ...],
) -> Planted:
    from interp_hooks.hooking import hook

    name = f"constructed-{task.name}"
    model = hook(module, name=name, tokenizer=tokenizer_of(task.words), note=source)
    truth = Truth(
        task.name,
        dict(sorted(heads.items())),
        model.n_layers,
        model.n_heads,
        source,
        name,
        edges=varying,
        constant_edges=constant,
        complete_edges=True,
        notes=notes,
    )
    return Planted(model, task, truth, task.name, task.summary)
