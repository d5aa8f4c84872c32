"""Workers of a Ray cluster, one piece in hand each; one that dies is started again."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

from interp.errors import InputError, WorkerError
from interp.workers.work import Work
from interp.workers.worker import Answer, Worker

#: how often a piece is begun again whose worker dies
AGAIN = 3
#: seconds that a cluster has to answer
KNOCK = 5.0
#: bytes of Ray's store of objects on this machine: what is handed about is small
STORE = 200 << 20


class Order(NamedTuple):
    """A piece to be done: the fingerprint of its run, and its key."""

    run: str
    key: str


class Pool:
    """Workers that do pieces of runs.

    Args:
        workers: how many; None for one a GPU, or one a core where there are no GPUs.
        address: of a Ray cluster, "auto" for the one that this machine is part of; None to start
            Ray here for the length of the pool.
        threads: of each worker on a CPU; None for an equal share of this machine's cores.
        on_gpu: workers have GPUs, shared out evenly.

    Raises:
        InputError: no cluster at the address, or fewer cores than are asked for.
    """

    def __init__(self, workers: int | None, address: str | None, threads: int | None, on_gpu: bool):
        import ray

        self._actors: list[Any] = []
        self._mine = not ray.is_initialized()  # what the caller has started is used, and left
        here = self._mine and address is None
        cores = _cores()
        if self._mine or address is not None:
            _join(address, workers or cores, self._mine)
        there = dict(ray.cluster_resources() if here else ray.available_resources())
        gpus = there.get("GPU", 0.0) if on_gpu else 0.0
        self.threads = threads or (max(1, cores // (workers or cores)) if here else 1)
        free = int(there.get("CPU", 0.0))
        self.workers = workers or int(gpus) or max(1, free if here else free // self.threads)
        self.gpus = min(1.0, gpus / self.workers) if self.workers >= gpus else gpus // self.workers
        asked = 1 if here else self.threads  # Ray counts one core a worker here, as it was told
        if self.workers * asked > free:
            self.close()
            raise InputError(
                f"{self.workers} workers of {self.threads} threads do not fit into the {free} "
                "cores of the cluster that are free; take fewer of either, or wait for what runs "
                "there."
            )
        self._actors = self._started(asked)
        #: the processes that have answered, the latest last
        self.seen: dict[str, None] = {}

    def _started(self, cores: int) -> list[Any]:
        import ray

        again: dict[str, Any] = dict(max_restarts=-1, max_task_retries=AGAIN)
        remote = ray.remote(num_cpus=cores, num_gpus=self.gpus, **again)(Worker)
        return [remote.remote(self.threads) for _ in range(self.workers)]

    @property
    def lost(self) -> int:
        """How many workers died and were started again so far."""
        return max(0, len(self.seen) - self.workers)

    def run(
        self, orders: Sequence[Order], works: Mapping[str, tuple[dict[str, Any], Work]]
    ) -> Iterator[tuple[Order, Answer]]:
        """Each order with its answer, as they are done; they are begun in order.

        Args:
            orders: the pieces.
            works: fingerprint → (what `interp.load` is given, the run).

        Raises:
            WorkerError: the workers of a piece died again and again.
        """
        import ray
        from ray.exceptions import RayActorError

        told = {run: (ray.put(recipe), ray.put(work)) for run, (recipe, work) in works.items()}
        queue = list(orders)
        idle, busy = list(self._actors), dict[Any, tuple[Order, Any]]()
        while queue or busy:
            while queue and idle:
                order, actor = queue.pop(0), idle.pop(0)
                busy[actor.do.remote(order.run, *told[order.run], order.key)] = order, actor
            with _heard():
                ready, _ = ray.wait(list(busy))
            for future in ready:
                order, actor = busy.pop(future)
                try:
                    answer: Answer = ray.get(future)
                except RayActorError as error:
                    raise WorkerError(
                        f"The workers that were handed the piece {order.key} died "
                        f"{1 + AGAIN} times, most often for lack of memory; take fewer workers or "
                        "shorter inputs. What is finished is kept."
                    ) from error
                self.seen.pop(answer.who, None)
                self.seen[answer.who] = None
                idle.append(actor)
                yield order, answer

    def close(self) -> None:
        """End the workers, and Ray where it was started here."""
        import ray

        with _heard():
            if self._mine:  # the workers end with it
                ray.shutdown()
            else:
                for actor in self._actors:
                    ray.kill(actor)
            self._actors = []


def _join(address: str | None, cores: int, new: bool) -> None:
    """Join the cluster at an address, or start Ray here, where that is `new`. Raises `InputError`
    where no cluster answers."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing here calls home
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = dict(log_to_driver=False, configure_logging=False)
    if address is None:
        # Ray's workers give way to all other work; ours are the run itself
        os.environ.setdefault("RAY_worker_niceness", "0")
        own: dict[str, Any] = dict(
            num_cpus=cores, include_dashboard=False, object_store_memory=STORE
        )
        ray.init("local", **own, **quiet)
        return
    try:
        _knock(address)
        if new:
            ray.init(address, **quiet)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"No Ray cluster answers at {address}; start one with `ray start --head`, or leave the "
            "address out to start workers on this machine."
        ) from error


def _knock(address: str) -> None:
    """Raise `OSError` where nothing listens at an address that has a port: Ray itself would ask
    again for many minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _heard() -> Iterator[None]:
    """What Ray says of dead workers goes to stderr, so that stdout holds results alone."""
    with redirect_stdout(sys.stderr):
        yield
