"""vLLM's entry points: called in every process of an engine, once or more, and quietly."""

from __future__ import annotations

from functools import wraps
from importlib.util import find_spec
from typing import Any


def register() -> None:
    """Makes engines of this process take edits and statistics where they are started for them; of
    others nothing changes, and without vLLM nothing happens."""
    if find_spec("vllm") is None:
        return
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from interp_vllm import front

    front.install(InputProcessor)
    _install_worker(WorkerWrapperBase)


def _install_worker(wrapper: type) -> None:
    if getattr(wrapper, "_interp", False):
        return
    wrapper._interp = True  # type: ignore[attr-defined]
    own = wrapper.initialize_from_config  # type: ignore[attr-defined]

    @wraps(own)
    def initialize_from_config(self: Any, *args: Any, **settings: Any) -> Any:
        given = own(self, *args, **settings)
        from interp_vllm.worker import install

        install(self.worker)
        return given

    wrapper.initialize_from_config = initialize_from_config  # type: ignore[attr-defined]
