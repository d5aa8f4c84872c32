"""Runs independent jobs on as many threads as PyTorch may use, each job on one thread.

Splitting every small operation over threads ends each in a barrier, which on a busy machine waits for a time slice: a
chunked pass then ran five times slower on two threads than on one. Jobs meet once, at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def workers(device: torch.device) -> int:
    """How many jobs may run side by side; 1 off the CPU and under a dispatch mode, which is seen by one thread only."""
    if device.type != "cpu" or _get_current_dispatch_mode() is not None:
        return 1
    return torch.get_num_threads()


def run_jobs(jobs: Sequence[Callable[[], None]], count: int) -> None:
    """Runs all jobs, `count` at a time; they must write to disjoint memory. The first exception is raised."""
    if count <= 1 or len(jobs) <= 1:
        for job in jobs:
            job()
        return
    inference = torch.is_inference_mode_enabled()

    def work(job: Callable[[], None]) -> None:
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)  # of this thread
        with torch.inference_mode(inference), torch.no_grad():
            job()

    key = (os.getpid(), count)  # threads do not survive a fork
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(count, thread_name_prefix="interp_kernels")
    try:
        futures = [_pools[key].submit(work, job) for job in jobs]
        errors = [future.exception() for future in futures]
    finally:
        torch.set_num_threads(count)  # the workers' 1 is also the default of threads yet to start
    for error in errors:
        if error is not None:
            raise error
