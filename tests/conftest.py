"""Shared fixtures: tiny random models by architecture, the pocket tokenizer; few threads, quiet
libraries."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# two workers run side by side (pytest-xdist); neither they, nor what they start, nor the notebooks'
# kernels may fight for the cores
os.environ.setdefault(
    "OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else str(os.cpu_count() or 1)
)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

alone = "PYTEST_XDIST_WORKER" not in os.environ
torch.set_num_threads(int(os.environ.get("INTERP_TEST_THREADS", "2" if alone else "1")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long-until",
        type=float,
        help="begin no test marked `long` after this time, in seconds since the epoch",
    )
    parser.addoption(
        "--end-at",
        type=float,
        help="end the run at this time, and say what was running, in seconds since the epoch",
    )


def pytest_configure(config: pytest.Config) -> None:
    from progress import LongUntil, Progress

    config.pluginmanager.register(LongUntil(config.getoption("--long-until")), "interp-long-until")
    if alone:
        config.pluginmanager.register(
            Progress(config, config.getoption("--end-at")), "interp-progress"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `gpu` needs one; notebooks and the folder `slow` are slow; what is long is
    slow, too."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("long")
        if item.get_closest_marker("long") or item.path.parent.name == "slow":
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # the longest first, so that no worker is left alone with them at the end, then the folder of
    # slow ones; under a limit of time the longest are what is left out
    first = config.getoption("--long-until") is None
    items.sort(
        key=lambda item: (
            (item.get_closest_marker("long") is None) == first,
            item.path.parent.name != "slow",
        )
    )


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """No chatter from transformers."""
    warnings.filterwarnings("ignore", module="transformers")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of the bundled model, built anew."""
    from train_pocket_llama import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """name → a fresh tiny random model (see `tiny.build`)."""
    import tiny

    return tiny.build


@pytest.fixture(scope="session")
def tapped(tokenizer: Any) -> Callable[[str], Any]:
    """name → (HookedModel, untouched eager twin), built once; vocabulary of 101 tokens, no
    tokenizer."""
    import tiny

    from interp_hooks import hook

    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            model = tiny.build(name)
            made[name] = hook(model, name=name), tiny.eager(model)
        return made[name]

    return get


@pytest.fixture(scope="session")
def worded(tokenizer: Any) -> Callable[[str], Any]:
    """name → (HookedModel with the pocket tokenizer, untouched eager twin), built once."""
    import tiny

    from interp_hooks import hook

    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            model = tiny.build(name, len(tokenizer))
            made[name] = hook(model, name=name, tokenizer=tokenizer), tiny.eager(model)
        return made[name]

    return get


@pytest.fixture(scope="session")
def pocket() -> Any:
    """The bundled pocket-llama. Tests leave no edit on it."""
    import interp

    return interp.load("llama")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Many small products: threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
