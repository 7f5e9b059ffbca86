"""A run's folder: one run at a time in it, and an older one set aside, never deleted."""

from __future__ import annotations
import contextlib
import datetime
import fcntl
import glob
import json
import logging
import os
import shutil
import socket
import time
import weakref
from collections.abc import Iterator, Sequence

logger = logging.getLogger("detectron2.agvm_d2")

LOCK = ".run.lock"
GRACE = 5.0  # s; a run that is being stopped may still be there
# What a run leaves, and the next one in the folder would mix with its own.
OF_A_RUN = (
    "metrics.json",
    "last_checkpoint",
    "model_*.pth",
    "log.txt*",
    "config.yaml*",
    "events.out.tfevents.*",
)


class FolderLock:
    """Held by the process that trains in a folder, until this object is gone or the process is.

    It is a POSIX record lock on a file: the kernel drops it when the process ends, however that
    happens, so a file that a killed run has left locks nobody out. NFS takes such locks between
    machines, where its lock daemon runs; a file system that has none is told once and goes without.
    Unlike flock's it does not pass to child processes, such as a data loader's that outlive a kill.
    """

    _held: weakref.WeakValueDictionary[str, FolderLock] = weakref.WeakValueDictionary()

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    @classmethod
    def take(cls, folder: str) -> FolderLock | None:
        """None where there are no locks: a remote folder, Windows, some network file systems.

        Raises:
            FileExistsError: another process trains there; names it.
        """
        if "://" in folder:
            return None
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(os.path.realpath(folder), LOCK)
        if path in cls._held:  # a second descriptor's close would drop the lock
            return cls._held[path]
        lock = cls(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        end = time.monotonic() + GRACE
        while True:
            try:
                fcntl.lockf(lock._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # POSIX allows both
                if time.monotonic() > end:
                    raise FileExistsError(
                        f"OUTPUT_DIR: another run trains in '{folder}': "
                        f"{_owner(lock._descriptor)}. Wait for its end, stop it, or give this run "
                        "a folder of its own."
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                logger.warning(f"'{path}' cannot be locked ({error}): let no other run in there.")
                return None
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        os.ftruncate(lock._descriptor, 0)
        os.write(lock._descriptor, json.dumps(owner).encode())
        cls._held[path] = lock
        for name in ("*.pth.*.part", "last_checkpoint.*.part"):  # of a killed run
            for part in glob.glob(os.path.join(glob.escape(folder), name)):
                with contextlib.suppress(OSError):
                    os.remove(part)
        return lock


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def _now() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def check_free(folder: str) -> None:
    """FileExistsError as `FolderLock.take`; nothing is written where there is no lock file."""
    if os.path.exists(os.path.join(folder, LOCK)):
        FolderLock.take(folder)


def holds_a_run(folder: str) -> bool:
    """Are there checkpoints, or metrics?"""
    metrics = os.path.join(folder, "metrics.json")
    has_metrics = os.path.isfile(metrics) and os.path.getsize(metrics) > 0
    return has_metrics or any(
        glob.glob(os.path.join(glob.escape(folder), pattern)) for pattern in OF_A_RUN[1:3]
    )


def set_aside(folder: str, keep: Sequence[str] = ()) -> str:
    """Move what an older run has left in `folder` to old-TIME in it; "" where there is none.

    Args:
        keep: files that the new run starts from: they also stay where they are.

    Returns:
        The folder that it went to.
    """
    if "://" in folder or not holds_a_run(folder):
        return ""
    target = os.path.join(folder, f"old-{_now()}")
    while os.path.exists(target):
        target += "+"
    os.makedirs(target)
    for pattern in OF_A_RUN:
        for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
            new = os.path.join(target, os.path.basename(path))
            if any(os.path.exists(file) and os.path.samefile(path, file) for file in keep):
                shutil.copy2(path, new)
            else:
                os.replace(path, new)
    return target


@contextlib.contextmanager
def config_kept(folder: str, keep: bool = True) -> Iterator[None]:
    """Detectron2's default_setup writes config.yaml at once; where this run is not the folder's
    own, or may be refused, the one that is there stays."""
    path = os.path.join(folder, "config.yaml")
    text = None
    if keep and "://" not in folder and os.path.isfile(path) and holds_a_run(folder):
        with open(path, "rb") as f:
            text = f.read()
    try:
        yield
    finally:
        if text is not None:
            with open(path, "wb") as f:
                f.write(text)
