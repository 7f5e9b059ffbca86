"""A signal, such as Slurm's or Ctrl-C's, ends training with a checkpoint, on all workers alike.

The workers agree on the iteration after which to stop by one all-reduce of one number on the CPU.
It is posted when an iteration ends and read before the next begins, so it waits for no GPU, and for
the other workers only where Detectron2's own gathering of the losses has just done so.
"""

from __future__ import annotations
import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from ..shards import is_sharded
from .rendezvous import training_timeout

logger = logging.getLogger("detectron2.agvm_d2")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again". 128 + n says that nothing was saved.
# A terminal, Slurm and a launcher each pass a signal on, so one signal comes two or three times.
AGAIN = 2.0  # s
# After an aborted evaluation, for one that no signal has reached, or that waits for this one in a
# gathering of results, which only its end breaks off.
PATIENCE = timedelta(seconds=5)
SAVING = timedelta(minutes=10)  # for the checkpoint that the main process writes
ORPHAN = 120.0  # s, for a checkpoint when the launcher has been killed


class Preempted(SystemExit):
    """The checkpoint is written and this process should end, with EXIT_CODE."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class SignalCatcher:
    """Notes the first signal in `signum`; the same one again, AGAIN s later, ends the process.

    Signals that are ignored, as nohup does, or that a project handles itself, are left alone.

    Args:
        on_signal: called with the signal each time.
        on_end: called before the process ends.
    """

    def __init__(
        self, on_signal: Callable[[int], None], on_end: Callable[[], None] = lambda: None
    ) -> None:
        self.signum = 0
        self._on_signal, self._on_end = on_signal, on_end
        self._first: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def forget(self) -> None:
        """What has come, before training begins anew."""
        self.signum = 0
        self._first.clear()

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows it nowhere else
        for signum in SIGNALS:
            if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[signum] = signal.signal(signum, self._handle)

    def restore(self, ignore: bool = False) -> None:
        """What was there before; or, in a process that is about to end, nothing."""
        for signum, before in self._before.items():
            signal.signal(signum, signal.SIG_IGN if ignore else before)
        self._before.clear()

    @contextlib.contextmanager
    def not_in_children(self) -> Iterator[None]:
        """Processes that this one forks meanwhile have the handlers of before: a SIGTERM ends them.
        Those of a multiprocessing.Pool, as in a panoptic evaluation, may else wait for ever: Python
        runs no handler of its own while a lock is waited for.

        Not while training: a project's loader should outlive a signal to all processes.
        """
        _tell_children()
        _not_in_children.add(self)
        try:
            yield
        finally:
            _not_in_children.discard(self)

    def _handle(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if now - self._first.setdefault(signum, now) > AGAIN:
            self._on_end()
            end_by(signum)
        self.signum = self.signum or signum
        self._on_signal(signum)


_not_in_children: set[SignalCatcher] = set()


@functools.lru_cache(maxsize=1)
def _tell_children() -> None:
    """Signals wait while a process is forked, since Python forgets those that come to the child
    before its handlers are set."""
    masks = threading.local()

    def block() -> None:
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def restore() -> None:
        for catcher in _not_in_children:
            catcher.restore()
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=restore)


def end_by(signum: int) -> None:
    """End this process as the signal does by default."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # a container's first process hears no signal of its own


def launcher_pid() -> int | None:
    """Of the process that started this worker, torch's spawn or torchrun; Slurm's ends its own."""
    spawner = multiprocessing.parent_process()
    if spawner is not None:
        return spawner.pid
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


@functools.lru_cache(maxsize=1)
def leave_with_the_launcher() -> None:
    """If it is killed, train no longer than to a checkpoint."""
    launcher, spawner = launcher_pid(), multiprocessing.parent_process()

    def wait() -> None:
        # A fork server is the parent of those that it starts for another process.
        while spawner.is_alive() if spawner is not None else os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN)
        os.kill(os.getpid(), signal.SIGKILL)

    if launcher is not None:
        threading.Thread(target=wait, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _cpu_group(world: Any) -> Any:
    """All workers, over gloo; apart from `world`, whose collectives have an order of their own."""
    return dist.new_group(backend="gloo", timeout=training_timeout())


class PreemptionHook(HookBase):
    """Ends training with a checkpoint and `Preempted` after a signal; register it as the first.

    All hooks are done with an iteration when its checkpoint is written. An evaluation is aborted if
    its function is wrapped by `abortable`; that of a sharded model goes on to its end.
    """

    def __init__(self, checkpointer: Checkpointer):
        self._checkpointer = checkpointer
        self._sharded = is_sharded(checkpointer.model)
        self._signals = SignalCatcher(self._on_signal)
        self._leaving = self._evaluating = self.over = False
        self._agreed = 0  # the signal, once all workers know of it
        self._flag: torch.Tensor | None = None
        self._work: Any = None

    def before_train(self) -> None:
        self._leaving = self._evaluating = self.over = False
        self._work, self._agreed = None, 0
        if comm.get_world_size() > 1:
            _cpu_group(dist.group.WORLD)  # all workers must come: not at the first signal
            leave_with_the_launcher()  # also Detectron2's
        self._signals.forget()
        self._signals.install()

    def after_train(self) -> None:
        self.over = True  # but for an evaluation in a later hook
        self.restore_signals()

    def restore_signals(self) -> None:
        """What was done on them before training."""
        # The launcher sends SIGTERM to the others when the first worker ends.
        self._signals.restore(ignore=self._leaving and comm.get_world_size() > 1)

    def after_step(self) -> None:
        self._post()

    def before_step(self) -> None:
        if self._agreed or self._answer():
            self.trainer.iter -= 1  # this one has not been made
            self._leave()

    def _on_signal(self, signum: int) -> None:
        if self._evaluating:
            self._evaluating = False
            raise Preempted

    def _post(self) -> None:
        if comm.get_world_size() > 1:
            self._flag = torch.tensor([self._signals.signum])
            group = _cpu_group(dist.group.WORLD)
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group, async_op=True)

    def _answer(self, *timeout: timedelta) -> int:
        """The signal that any worker had got when it posted; 0: none, or nothing was posted."""
        if comm.get_world_size() == 1:
            return self._signals.signum
        if self._work is None:
            return 0
        work, self._work = self._work, None
        work.wait(*timeout)
        assert self._flag is not None
        self._signals.signum = self._signals.signum or int(self._flag)
        return int(self._flag)

    def _leave(self, alone: bool = False) -> NoReturn:
        """Save, and, unless `alone`, wait until it is saved.

        Raises:
            Preempted: always, unless the checkpoint cannot be written.
        """
        self._leaving = True
        trainer, name = self.trainer, signal.Signals(self._signals.signum).name
        logger.warning(f"{name}: stopping after iteration {trainer.iter}.")
        # Else it was the last iteration or evaluation, and model_final is there.
        # A sharded model needs all workers for it; a checkpoint of before is there.
        saves = not alone if self._sharded else comm.is_main_process()
        made = trainer.iter >= trainer.start_iter  # an iteration, by this run
        if made and trainer.iter + 1 < trainer.max_iter and saves:
            self._checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        try:  # nobody ends before the checkpoint is there: the launcher would stop all
            if not alone:
                self._post()
                self._answer(SAVING)
        except RuntimeError:
            if not comm.is_main_process():
                raise
        if comm.is_main_process():
            saved = "the checkpoint is written" if made else "nothing was trained, so none is saved"
            logger.warning(
                f"{name}: {saved}. The exit code is {EXIT_CODE}; the same command with --resume "
                "goes on from here."
            )
        raise Preempted

    def abortable(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        """`evaluate`, called on all workers alike, which a signal ends before it is done."""

        def evaluate_or_leave() -> Any:
            if self._leaving:
                return None
            self._signals.install()
            try:
                return evaluate_until_signal()
            finally:
                if self.over:
                    self.restore_signals()

        def evaluate_until_signal() -> Any:
            self._agreed = self._agreed or self._answer()
            if self._agreed:
                return self._leave() if self.over else None
            results, aborted = None, False
            try:
                # In a forward pass of a sharded model the workers wait for each other: none leaves.
                whole = contextlib.nullcontext() if self._sharded else self._until_signal()
                with whole, self._signals.not_in_children():
                    results = evaluate()
            except Preempted:
                aborted = True
            except Exception:
                time.sleep(0.5)  # it may have ended a loader's process before it came here
                if not self._signals.signum or self._sharded:
                    raise
                aborted = True
            # Once more after the evaluation, aborted or not: the same number for each worker.
            try:
                self._post()
                self._agreed = self._answer(PATIENCE) if aborted else self._answer()
            except RuntimeError:  # another worker has gone, or does not come
                if not self._signals.signum:
                    raise
                self._leave(alone=True)
            if self._agreed and self.over:
                self._leave()
            return results  # hooks registered later still have their part of the iteration to do

        return evaluate_or_leave

    @contextlib.contextmanager
    def _until_signal(self) -> Iterator[None]:
        self._evaluating = True
        if self._signals.signum:  # it came a moment before
            self._on_signal(self._signals.signum)
        try:
            yield
        finally:
            self._evaluating = False


def leave_signals_to_the_trainer(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: a signal to all processes ends none of the loader's, which
    the trainer still needs for its last iteration. The trainer's own SIGTERM ends it."""
    for signum in SIGNALS:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    trainer = multiprocessing.parent_process()
    pid = trainer.pid if trainer is not None else os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
