"""Digests of anything that shapes a result: values, tensors, and code by what it does."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from interp.support.tensor_digest import tensor_digest

#: our own packages; what of their code shapes numbers is digested whole by `package_code`
OURS = ("interp", "interp_hooks", "interp_kernels")
#: folders whose code shapes no numbers
FACES = ("cli", "report")
SCALARS = (type(None), bool, int, float, complex, str, bytes)


def fingerprint(*values: Any) -> str:
    """SHA-256 (32 hex digits) over values: equal for equal ones, in any process.

    Containers and dataclasses by what they hold, tensors and arrays by their numbers, functions and
    classes by their code (with defaults, closures, and the helpers and constants that they name in
    their own module or in a user's), objects by class and attributes. Comments and line numbers
    don't count.

    Example:
        >>> from interp.support.fingerprint import fingerprint
        >>> fingerprint({"a": 1, "b": [2.0]}) == fingerprint({"b": [2.0], "a": 1})
        True
        >>> fingerprint(lambda x: x + 1) == fingerprint(lambda x: x + 2)
        False
    """
    digest = _Digest()
    for value in values:
        digest.add(value)
    return digest.sha.hexdigest()[:32]


def package_code() -> str:
    """SHA-256 over the source files of our packages, but for those that only show results."""
    sha = hashlib.sha256()
    for package in OURS:
        spec = sys.modules.get(package)
        file = getattr(spec, "__file__", None)
        if file is None:
            continue
        root = Path(file).parent
        for path in sorted(root.rglob("*.py")):
            inner = path.relative_to(root)
            if not (package == "interp" and inner.parts[0] in FACES):
                sha.update(f"{package}/{inner.as_posix()}\0".encode() + path.read_bytes())
    return sha.hexdigest()[:32]


class _Digest:
    """A SHA-256 that is fed values. An object counts by what it holds, so that a copy (from another
    process) counts as the original; inside itself it is told by how far out it began."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self._known: dict[int, str] = {}
        self._open: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is an object's own only while it lives

    def say(self, kind: str, content: str | bytes = b"") -> None:
        raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        self.sha.update(f"{kind}:{len(raw)}:".encode() + raw)

    def add(self, value: Any) -> None:
        if isinstance(value, SCALARS) and not isinstance(value, enum.Enum):
            self.say(type(value).__name__, value if isinstance(value, bytes) else repr(value))
            return
        key = id(value)
        if key in self._open:
            self.say("again", str(self._open[key]))
            return
        if key not in self._known:
            self._alive.append(value)
            outer, self.sha = self.sha, hashlib.sha256()
            self._open[key] = len(self._open)
            try:
                if not (self._data(value) or self._code(value)):
                    self._object(value)
            finally:
                del self._open[key]
                self._known[key], self.sha = self.sha.hexdigest(), outer
        self.say("value", self._known[key])

    def _data(self, value: Any) -> bool:
        """Feed a value that is data; False for what is none."""
        if isinstance(value, enum.Enum):
            self.say("enum", f"{_name(type(value))}.{value.name}")
        elif isinstance(value, PurePath):
            self.say("path", str(value))
        elif isinstance(value, Mapping):
            self.say("map", str(len(value)))
            for key in sorted(value, key=lambda k: (type(k).__name__, str(k))):
                self.add(key)
                self.add(value[key])
        elif isinstance(value, list | tuple):
            self.say("list", str(len(value)))
            for one in value:
                self.add(one)
        elif isinstance(value, set | frozenset):
            self.say("set", "".join(sorted(fingerprint(one) for one in value)))
        elif isinstance(value, np.generic | np.ndarray):
            array = np.asarray(value)
            if array.dtype == object:
                self.add(array.tolist())
            else:
                self.say("array", f"{array.dtype.str}{array.shape}")
                self.say("numbers", array.tobytes())
        elif isinstance(value, np.random.Generator):
            self.add(value.bit_generator.state)
        else:
            return self._foreign(value)
        return True

    def _foreign(self, value: Any) -> bool:
        """Feed a tensor, a dtype or a picture: told by their module, which need not be imported."""
        root = type(value).__module__.partition(".")[0]
        if root == "torch" and type(value).__name__ in ("dtype", "device"):
            self.say("torch", str(value))
        elif "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
            self.say("tensor", tensor_digest(value))
        elif root == "PIL" and hasattr(value, "tobytes"):
            self.say("picture", f"{value.mode}{value.size}")
            self.say("pixels", value.tobytes())
        elif hasattr(value, "to_parquet") and hasattr(value, "columns"):
            self.say("frame", value.to_csv().encode())
        else:
            return False
        return True

    def _code(self, value: Any) -> bool:
        """Feed what is code; False for what is none."""
        if isinstance(value, functools.partial):
            self.add([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self.add([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.CodeType):
            self._instructions(value)
        elif isinstance(value, staticmethod | classmethod):
            self.add(value.__func__)
        elif isinstance(value, property):
            self.add([value.fget, value.fset])
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self.say("module", value.__name__)
        elif isinstance(value, types.BuiltinFunctionType | types.BuiltinMethodType):
            self.say("builtin", _name(value))
        else:
            return False
        return True

    def _function(self, function: types.FunctionType) -> None:
        inner = inspect.unwrap(function)
        if inner is not function:
            self.add(inner)
        self.say("function", _name(function))
        self._instructions(function.__code__)
        self.add([function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self._reached(held, function.__module__)
        used = set(_names(function.__code__))
        for name in sorted(used & set(function.__globals__)):
            self.say("global", name)
            target = function.__globals__[name]
            self._reached(target, function.__module__)
            if isinstance(target, types.ModuleType) and _is_users(target.__name__):
                for attribute in sorted(used & set(vars(target))):
                    self._reached(vars(target)[attribute], target.__name__)

    def _reached(self, target: Any, module: str) -> None:
        """Feed what code of `module` names: near code and data whole, far code by its name."""
        if isinstance(target, types.FunctionType | type):
            near = target.__module__ == module or _is_users(target.__module__)
            if near:
                self.add(target)
            else:
                self.say("named", _name(target))
        elif _is_data(target) or _is_users(type(target).__module__):
            self.add(target)
        else:
            self.say("named", _name(type(target)))

    def _instructions(self, code: types.CodeType) -> None:
        self.say("code", code.co_code)
        self.say("names", " ".join((*code.co_names, *code.co_varnames, *code.co_freevars)))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._instructions(constant)
            else:
                self.add(constant)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            self.say("class", _name(base))
            root = base.__module__.partition(".")[0]
            if root not in OURS and not _is_users(base.__module__) and base is not cls:
                continue
            if root in sys.stdlib_module_names:
                continue
            for name, value in sorted(vars(base).items()):
                plain = inspect.unwrap(getattr(value, "__func__", value))
                if isinstance(plain, types.FunctionType):
                    written = plain.__code__.co_filename == "<string>" and name[:2] == "__"
                    if written and "__dataclass_fields__" in vars(base):
                        continue  # by dataclasses, of the fields
                elif not isinstance(value, property) and (name[:2] == "__" or not _is_data(value)):
                    continue
                self.say("attribute", name)
                self.add(value)

    def _object(self, value: Any) -> None:
        """Feed a user's object, or one of ours that is small, by its attributes; others by name."""
        kind = type(value)
        root = kind.__module__.partition(".")[0]
        ours = root in OURS and not hasattr(value, "sites")  # not a model
        if not ours and not _is_users(kind.__module__) and not dataclasses.is_dataclass(value):
            self.say("object", _name(kind))
            return
        if any(base.__name__ == "Module" and base.__module__[:5] == "torch" for base in kind.mro()):
            self.say("object", _name(kind))
            return
        self.add(kind)
        slots = [s for base in kind.__mro__ for s in getattr(base, "__slots__", ())]
        held = dict(getattr(value, "__dict__", {}))
        held |= {s: getattr(value, s) for s in slots if hasattr(value, s) and s[:2] != "__"}
        self.add(held)


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names and attributes that code and the functions in it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value))}"


def _is_data(value: Any) -> bool:
    """Whether a value is numbers and text, alone or in containers or arrays."""
    if isinstance(value, Mapping):
        return all(_is_data(k) and _is_data(v) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_data, value))
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
        return True
    return isinstance(value, (SCALARS, np.generic | np.ndarray))


@functools.lru_cache(maxsize=4096)
def _is_users(module: str | None) -> bool:
    """Whether a module is neither Python's, nor ours, nor of an installed package."""
    root = (module or "").partition(".")[0]
    if not root or root in OURS or (root in sys.stdlib_module_names and root != "__main__"):
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None:
        return root == "__main__" or module not in sys.modules
    paths = sysconfig.get_paths()
    installed = (paths[k] for k in ("stdlib", "platstdlib", "purelib", "platlib"))
    return not any(Path(file).is_relative_to(p) for p in installed) and not (
        {"site-packages", "dist-packages"} & set(Path(file).parts)
    )
