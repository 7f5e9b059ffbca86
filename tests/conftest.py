from __future__ import annotations
import atexit
import contextlib
import logging
import os
import pathlib
import queue
import shutil
import socket
import tempfile
import time
import traceback
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Before Detectron2 reads it at import; spawned workers inherit it.
if "AGVM_TEST_DATASETS" not in os.environ:
    os.environ["AGVM_TEST_DATASETS"] = tempfile.mkdtemp(prefix="agvm_d2-test-datasets-")
    atexit.register(shutil.rmtree, os.environ["AGVM_TEST_DATASETS"], ignore_errors=True)
os.environ["DETECTRON2_DATASETS"] = DATASETS = os.environ["AGVM_TEST_DATASETS"]

TIMEOUT = 1800  # s; against a hang, also on a busy machine

TESTS = pathlib.Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Several processes, a real detector or the command line: an integration test."""
    for item in items:
        in_folder = TESTS / "integration" in item.path.parents
        if in_folder or {"workers", "digits"} & set(item.fixturenames):
            item.add_marker("integration")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A small digits dataset where the registered one would be; returns DETECTRON2_DATASETS."""
    from agvm_d2.data import digits as data

    data.make(data.root(), {"train": 24, "val": 8})
    return DATASETS


class Workers:
    """`num` processes, kept for the session: importing torch takes longer than most tests."""

    def __init__(self, num: int, backend: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context("spawn")
        self.tasks = [context.SimpleQueue() for _ in range(num)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_work, args=(i, num, backend, port, self.tasks[i], self.results))
            for i in range(num)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *args) -> list:
        """Call `function(*args)` in every worker; results by rank. What one raises is a failure."""
        for task in self.tasks:
            task.put((function, args))
        results = {}
        for _ in self.tasks:
            rank, ok, value = self._next_result()
            if not ok:
                self.close()
                pytest.fail(f"worker {rank}:\n{value}")
            results[rank] = value
        return [results[rank] for rank in sorted(results)]

    def _next_result(self) -> tuple:
        end = time.monotonic() + TIMEOUT
        while True:
            alive = all(process.is_alive() for process in self.processes)
            with contextlib.suppress(queue.Empty):
                return self.results.get(timeout=5)
            if not alive or time.monotonic() > end:
                self.close()
                codes = [process.exitcode for process in self.processes]
                raise RuntimeError(f"a worker died or gave no answer: exit codes {codes}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _work(rank: int, num: int, backend: str, port: int, tasks, results) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    from detectron2.utils import comm

    dist.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num
    )
    comm.create_local_process_group(num)
    while True:
        function, args = tasks.get()
        try:
            results.put((rank, True, function(*args)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))


@pytest.fixture(scope="session")
def workers():
    """`workers(n).run(function, *args)` on n processes over gloo, or over NCCL with a GPU each."""
    pools: dict[tuple[int, str], Workers] = {}

    def get(num: int, backend: str = "gloo") -> Workers:
        key = num, backend
        if key not in pools or not all(p.is_alive() for p in pools[key].processes):
            pools[key] = Workers(num, backend)
        return pools[key]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture
def d2_log(caplog):
    """Text of what was logged; Detectron2's logger may have been cut from the root by a set-up."""
    logger = logging.getLogger("detectron2")
    propagate, level = logger.propagate, logger.level
    logger.propagate = True
    logger.setLevel(logging.INFO)
    caplog.set_level(logging.INFO, logger="detectron2")
    yield caplog
    logger.propagate = propagate
    logger.setLevel(level)
