"""How the workers find each other: one store, within a stated time, and who is missing."""

from __future__ import annotations
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NamedTuple
from urllib.parse import urlsplit
import torch.distributed as dist

logger = logging.getLogger("detectron2.agvm_d2")

TIMEOUT = "AGVM_DIST_TIMEOUT"  # seconds
AT_START, IN_TRAINING = 300, 1800  # without it
CHANGES = f"; {TIMEOUT} (seconds) changes how long a worker waits."


class Worker(NamedTuple):
    """This process's place among all workers."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    dist_url: str


def _seconds(default: int) -> float:
    found = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(found or default)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e7:
        raise ValueError(f"{TIMEOUT}: found '{found}', but it must be a number of seconds above 0.")
    return seconds


def training_timeout() -> timedelta:
    """How long a worker waits for the others in training.

    Raises:
        ValueError: a bad AGVM_DIST_TIMEOUT.
    """
    return timedelta(seconds=_seconds(IN_TRAINING))


def start_timeout() -> timedelta:
    """The same at the start, and with the same error."""
    return timedelta(seconds=_seconds(AT_START))


def restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often torchrun has started the workers anew."""
    return int(env.get("TORCHELASTIC_RESTART_COUNT", 0))


def meet(worker: Worker) -> dist.Store:
    """The store of all workers, once all of them are there.

    Raises:
        ConnectionError: an address that is wrong or in use; two workers with one rank; workers that
            did not come, by rank.
    """
    timeout = start_timeout()
    store = _connect(worker, timeout)
    keys = [f"rank {rank}" for rank in range(worker.world_size)]
    if store.add(keys[worker.rank], 1) > 1:
        raise ConnectionError(
            f"Two workers have rank {worker.rank}, the second of them on '{socket.gethostname()}': "
            "each machine needs its own --machine-rank (torchrun: --node-rank). If torchrun has "
            "restarted several machines, start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1. A "
            "file:// address must be of a file that no earlier run has left: remove it."
        )
    try:
        # Rank 0 takes the store with it, so it stays until the others have looked.
        store.wait(keys, timeout + timedelta(seconds=2) if worker.rank == 0 else timeout)
    except RuntimeError:
        missing = "those that are missing"
        with contextlib.suppress(RuntimeError):
            ranks = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            missing = f"rank {', '.join(ranks)}"
        raise ConnectionError(
            f"Of {worker.world_size} workers, {missing} did not come within "
            f"{timeout.total_seconds():g} s (rank {worker.rank} is on '{socket.gethostname()}'). "
            f"Has every machine been started, with the same number of workers?{CHANGES}"
        ) from None
    return store


def _connect(worker: Worker, timeout: timedelta, serve: bool = True) -> dist.Store:
    """A connection of its own to the store, which rank 0 serves unless torchrun does.

    Raises:
        ConnectionError: the address is wrong or in use.
    """
    url = urlsplit(worker.dist_url)
    # torchrun has a store of its own, which outlives the workers.
    agent = url.scheme == "env" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if url.scheme == "file":
        found, _, _ = next(
            dist.rendezvous(worker.dist_url, worker.rank, worker.world_size, timeout=timeout)
        )
    else:
        if url.scheme == "env":
            what, host = "MASTER_ADDR, MASTER_PORT", os.environ.get("MASTER_ADDR", "")
            port = int(os.environ.get("MASTER_PORT") or 0)
        else:
            what, host, port = "--dist-url", url.hostname or "", url.port or 0
        if not (host and port):
            raise ConnectionError(
                f"{what}: '{host}:{port}' is no address; it must name rank 0's host and a port."
            )
        serves = serve and worker.rank == 0 and not agent
        try:
            found = dist.TCPStore(
                host, port, is_master=serves, timeout=timeout, wait_for_workers=False
            )
        except (RuntimeError, ValueError, OSError) as error:
            first = str(error).splitlines()[0]
            if "EADDRINUSE" in first or "address already in use" in first:
                raise ConnectionError(
                    f"{what}: port {port} of '{host}' is in use, by another run perhaps: choose "
                    "another, or on one machine --dist-url auto."
                ) from None
            raise ConnectionError(
                f"{what}: rank {worker.rank} cannot reach rank 0 at {host}:{port} within "
                f"{timeout.total_seconds():g} s ({first}). Is it rank 0's host, and is rank 0 "
                f"running?{CHANGES}"
            ) from None
    # A restart must not find the addresses of dead workers there (pytorch#135712). A store that
    # rank 0 serves is new each time, and the agents of several machines may count differently.
    return dist.PrefixStore(f"agvm_d2/{restarts() if agent else 0}", found)


class Pulse:
    """A thread by which the other workers know that this process lives.

    Rank 0 says, in the log, who has not been heard of, and rank 1 says it of rank 0; long before
    the timeout, and whatever the backend then does.

    Raises:
        ConnectionError: the store that the workers met at cannot be reached.
    """

    MISSED = 3  # beats

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._period = min(10.0, training_timeout().total_seconds() / 12)
        self._stop = threading.Event()
        watched = {0: range(1, worker.world_size), 1: range(1)}.get(worker.rank, range(0))
        self._heard = {rank: (0, time.monotonic()) for rank in watched}
        self._named: set[int] = set()
        self._threads: list[threading.Thread] = []
        if not worker.dist_url.startswith("file:"):  # that store counts who opens it
            allowed = timedelta(seconds=self._period * self.MISSED)
            # Two: a stopped rank 0 can hold up the one that talks to its store.
            self._start(self._beat, _connect(worker, allowed, serve=False))
            if self._heard:
                self._start(self._watch)

    def _start(self, target: Callable, *args: dist.Store) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def stop(self) -> None:
        """End the threads: Python aborts if one comes back from the store while it finalizes."""
        self._stop.set()
        for thread in self._threads:
            thread.join(1)  # s; one that a stopped rank 0 holds up does not come back

    def _beat(self, store: dist.Store) -> None:
        with contextlib.suppress(RuntimeError, OSError):  # rank 0, who serves the store, has ended
            while True:
                store.add(f"beat {self._worker.rank}", 1)
                for rank in self._heard:
                    beats = store.add(f"beat {rank}", 0)  # unlike get, waits for no first one
                    if beats != self._heard[rank][0]:
                        self._heard[rank] = beats, time.monotonic()
                if self._stop.wait(self._period):
                    return

    def _watch(self) -> None:
        while not self._stop.wait(self._period):
            self._name_the_silent()

    def _name_the_silent(self) -> None:
        for rank, (_, when) in self._heard.items():
            silent = time.monotonic() - when
            if silent < self._period * self.MISSED:
                self._named.discard(rank)
            elif rank not in self._named:
                self._named.add(rank)
                line = (
                    f"Nothing has been heard of rank {rank} for {silent:.0f} s: it is stopped, or "
                    f"its machine is out of reach. The others wait for it{CHANGES}"
                )
                logger.warning(line)
                if self._worker.rank:  # whose log is in a file of its own
                    print(f"rank {self._worker.rank}: {line}", file=sys.stderr, flush=True)
