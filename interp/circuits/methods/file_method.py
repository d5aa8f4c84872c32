"""A circuit method of one's own, in a Python file: `--method FILE.py:function`."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.paired_runs import PairedRuns
from interp.errors import InputError, InterpError
from interp.support.memory import is_out_of_memory
from interp_hooks.heads import Head

#: what names a function in a file
_WRITTEN = re.compile(r"(?P<file>.+\.py)(:(?P<function>[^:/\\]*))?")
_NODE = re.compile(r"input|output|MLP \d+|L\d+H\d+|L\d+KV\d+")
#: columns that a method can't be called as
TAKEN = ("tower", "kind", "layer", "head", "kv_head")


@dataclass(frozen=True)
class FileMethod(Method):
    """A function (model, prompts) → scores, run as the methods that are built in.

    It is given the `HookedModel` and the `Prompts`, and gives the scores of all heads as a (layers,
    heads) array, or as head → score; or edges as a DataFrame of `sender`, `receiver`, `kind`,
    `score` in the names of `Circuit.edges`, whose heads then score as in EAP: the strongest edge
    out of each. Scores below 0 are taken for signed effects, and heads are ranked by their size.

    The file's hash stands in the circuit's record. The file is run: it can do all that you can.

    Args:
        path: the file.
        function: its function.
        sha256: of the file; filled in.

    Raises `InputError` for a file that can't be read or fails, no such function, one that does not
    take two arguments, and what it gives that is no score of every head.

    Misleads:
        Nothing is known of what the function measures, and its passes are not counted. A score that
        is high by what it is made of (a head's size, its layer) ranks as well as one that knows the
        task: hold it against shuffled prompts.
    """

    path: str
    function: str
    sha256: str = field(default="", init=False)

    title = "A method of one's own"
    summary = "a function of a file: FILE.py:function"
    reading = "What the function says of each head; higher is more in the circuit."
    formula = "as the file has it"
    citation = "the file, by its hash"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            why = "there is none" if isinstance(error, FileNotFoundError) else str(error)
            raise InputError(
                f"The method's file {self.path} can't be read ({why}); a method is a name, or "
                "FILE.py:function."
            ) from error
        object.__setattr__(self, "sha256", hashlib.sha256(content).hexdigest())
        object.__setattr__(self, "name", self.function)
        if self.function in TAKEN:
            raise InputError(
                f"A method can't be called {self.function!r}, which is a column of every table; "
                "rename the function."
            )
        self._loaded()
        super().__post_init__()

    @classmethod
    def written(cls, method: str) -> FileMethod:
        """The method of "FILE.py:function". Raises `InputError`."""
        found = _WRITTEN.fullmatch(method)
        assert found is not None
        if not found["function"]:
            raise InputError(
                f"Name the function too, as {found['file']}:score; it takes (model, prompts)."
            )
        return cls(found["file"], found["function"])

    def record(self) -> dict[str, Any]:
        """The file's name, the function and the hash of the file."""
        return dict(file=Path(self.path).name, function=self.function, sha256=self.sha256)

    def find(self, runs: PairedRuns) -> Found:
        function = self._loaded()
        try:
            given = function(runs.model, runs.prompts)
        except InterpError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"{self.function} of {self.path} failed{self._line(error)}: "
                f"{type(error).__name__}: {_short(error)}."
            ) from error
        found = self._found(given, runs)
        found.notes.append(
            f"{self.function} is a function of {Path(self.path).name} "
            f"(sha256 {self.sha256[:12]}); its passes are not counted."
        )
        return found

    def _loaded(self) -> Callable[..., Any]:
        """The function. Raises `InputError`."""
        module = self._module()
        function = getattr(module, self.function, None)
        if not callable(function):
            there = [
                n
                for n, value in vars(module).items()
                if inspect.isfunction(value) and value.__module__ == module.__name__
            ]
            raise InputError(
                f"{self.path} has no function {self.function!r}; it has "
                f"{', '.join(there) or 'none'}."
            )
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            raise InputError(
                f"{self.function} of {self.path} takes {inspect.signature(function)}; a method "
                "takes (model, prompts)."
            ) from None
        except ValueError:
            pass  # of a builtin, which does not say
        return function

    def _module(self) -> ModuleType:
        """The file as a module. Raises `InputError`."""
        name = f"_method_{self.sha256[:16]}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look themselves up while the file runs
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise InputError(
                f"{self.path} can't be run{self._line(error)}: {type(error).__name__}: "
                f"{_short(error)}."
            ) from error
        finally:
            del sys.modules[name]
        return module

    def _line(self, error: BaseException) -> str:
        """Where in the file it went wrong."""
        if isinstance(error, SyntaxError) and error.lineno is not None:
            return f" (line {error.lineno})"
        here = Path(self.path).resolve()
        lines = [
            f.lineno
            for f in traceback.extract_tb(error.__traceback__)
            if Path(f.filename).resolve() == here
        ]
        return f" (line {lines[-1]})" if lines else ""

    def _found(self, given: Any, runs: PairedRuns) -> Found:
        if isinstance(given, pd.DataFrame):
            return self._of_edges(given, runs)
        if isinstance(given, Mapping):
            values = self._of_heads(given, runs)
        else:
            values = self._of_array(given, runs)
        if not np.isfinite(values).all():
            bad = runs.heads[int(np.flatnonzero(~np.isfinite(values))[0])]
            raise InputError(
                f"{self.function} of {self.path} gives {bad} the score {values[runs.index[bad]]}; "
                "every head needs a finite one."
            )
        if not (values < 0).any():
            return Found(values)
        return Found(
            np.abs(values), values,
            notes=[f"{self.function} gives scores below 0: heads are ranked by their size."],
        )  # fmt: skip

    def _of_heads(self, given: Mapping[Any, Any], runs: PairedRuns) -> np.ndarray:
        values = np.full(len(runs.heads), np.nan)
        place = {(h.layer, h.head): i for h, i in runs.index.items()}
        seen: set[int] = set()
        for key, value in given.items():
            head = Head.parse(key)  # HeadError says what is wrong
            index = place.get((head.layer, head.head))
            if index is None or index in seen:
                why = "which the model has not" if index is None else "twice"
                raise InputError(f"{self.function} of {self.path} scores {head}, {why}.")
            seen.add(index)
            values[index] = self._number(value, str(head))
        if len(seen) < len(values):
            missing = runs.heads[next(i for i in range(len(values)) if i not in seen)]
            raise InputError(f"{self.function} of {self.path} gives {missing} no score.")
        return values

    def _of_array(self, given: Any, runs: PairedRuns) -> np.ndarray:
        sizes = [site.n_heads for site in runs.sites.values()]
        wanted = (len(sizes), sizes[0])
        given = given.detach().cpu() if hasattr(given, "detach") else given
        try:
            array = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError):
            raise InputError(
                f"{self.function} of {self.path} gives {type(given).__name__}, not scores: a "
                "(layers, heads) array, head → score, or a DataFrame of edges."
            ) from None
        if len(set(sizes)) > 1:
            raise InputError(
                f"Layers of {runs.model.name} have different numbers of heads; give head → score."
            )
        if array.shape != wanted:
            raise InputError(
                f"{self.function} of {self.path} gives an array {array.shape}, and the model has "
                f"(layers, heads) {wanted}."
            )
        return array.reshape(-1)

    def _of_edges(self, given: pd.DataFrame, runs: PairedRuns) -> Found:
        needed = ("sender", "receiver", "kind", "score")
        lacking = [c for c in needed if c not in given]
        if lacking or not len(given):
            what = f"no column {lacking[0]!r}" if lacking else "no row"
            raise InputError(
                f"{self.function} of {self.path} gives a DataFrame with {what}; edges have "
                f"{', '.join(needed)}."
            )
        edges = given[list(needed)].reset_index(drop=True)
        known = {f"L{h.layer}H{h.head}" for h in runs.heads}
        for side in ("sender", "receiver"):
            for name in map(str, edges[side].unique()):
                if not _NODE.fullmatch(name) or ("H" in name and name not in known):
                    raise InputError(
                        f"{self.function} of {self.path} has the {side} {name[:40]!r}; nodes are "
                        "input, L0H1, L0KV0, MLP 0 and output, of this model."
                    )
        scores = np.array([self._number(v, "an edge") for v in edges["score"]])
        if not np.isfinite(scores).all():
            raise InputError(f"{self.function} of {self.path} gives an edge no finite score.")
        edges = edges.assign(score=scores.astype(np.float32))
        edges = edges.iloc[np.argsort(-np.abs(scores), kind="stable")].reset_index(drop=True)
        out = {str(name): group["score"] for name, group in edges.groupby("sender")}
        none = pd.Series([0.0])
        by_head = [out.get(f"L{h.layer}H{h.head}", none) for h in runs.heads]
        score = np.array([float(s.abs().max()) for s in by_head])
        return Found(score, np.array([float(s.sum()) for s in by_head]), edges=edges)

    def _number(self, value: Any, of: str) -> float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InputError(
                f"{self.function} of {self.path} gives {of} {value!r:.40}, which is no number."
            ) from None


def _short(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")[:200]
