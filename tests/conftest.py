from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LAUNCHERS = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "TORCHELASTIC_RUN_ID",
}


def pytest_configure() -> None:
    """Prepare what is decided once per process.

    Signals do what they do: what a shell starts in the background ignores these two, and all it starts too.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    # Triton asks once, when it is imported: without a GPU its kernels are interpreted.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _nothing_is_left_to_the_next_test() -> Iterator[None]:
    """Fails the test that leaves a process group or a variable of a launcher, not those that come after it."""
    before = {name: os.environ.get(name) for name in LAUNCHERS}
    yield
    left = {name for name in LAUNCHERS if os.environ.get(name) != before[name]} | (
        {"process group"} if dist.is_initialized() else set()
    )
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in LAUNCHERS & left:
        os.environ.pop(name, None)
    assert not left


def _run_rank(rank: int, world_size: int, port: int, function: Callable, results: Any, args: tuple) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=15))
    try:
        function(rank, results, *args)
        if dist.is_initialized():
            dist.barrier()  # rank 0 has the store, which others may still need
    finally:
        if dist.is_initialized():  # a whole job ends its own
            dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def on_ranks():
    """Runs ``function(rank, results, *args)`` on forked gloo processes and returns the shared results."""

    def run(world_size: int, function: Callable, *args: Any) -> dict[int, Any]:
        with mp.Manager() as manager:
            results = manager.dict()
            arguments = (world_size, _free_port(), function, results, args)
            mp.start_processes(_run_rank, arguments, nprocs=world_size, start_method="fork")
            return dict(results)

    return run
