"""AGVM.SCHEDULE gain in a Detectron2 trainer: its LR schedule, its ETA and its end."""

from __future__ import annotations
import contextlib
import math
from collections.abc import Iterator
from typing import Any
from detectron2.engine import HookBase, TrainerBase, hooks

from ..agvm import AGVM, NO_PROGRESS

# Hooks that ask which iteration is the last.
ASK = (
    hooks.PreciseBN,
    hooks.PeriodicCheckpointer,
    hooks.EvalHook,
    hooks.BestCheckpointer,
    hooks.PeriodicWriter,
)


class TrainingDone(BaseException):
    """Ends a trainer's loop of iterations; no Exception, which Detectron2 would log as a fault."""

    def __init__(self) -> None:
        super().__init__(
            "AGVM.SCHEDULE gain: training is done, and this loop does not know. Call it within "
            "agvm_d2.ends_when_done()."
        )


@contextlib.contextmanager
def ends_when_done() -> Iterator[None]:
    """`TrainerBase.train` ends where training is done, and what calls it goes on as after its last
    iteration; for a trainer whose own code wraps that loop, as DefaultTrainer's."""
    train = TrainerBase.train

    def train_until_done(self: TrainerBase, start_iter: int, max_iter: int) -> None:
        with contextlib.suppress(TrainingDone):
            train(self, start_iter, max_iter)

    TrainerBase.train = train_until_done
    try:
        yield
    finally:
        TrainerBase.train = train


class GainSchedule:
    """Lets AGVM's progress move a trainer's LR schedulers, and end its training.

    When it is done in iteration i, all hooks see `max_iter` i + 1 from then on, so that the last
    evaluation and checkpoint are made as ever; `before_step` of the next iteration, which hooks
    registered earlier still see, raises `TrainingDone`.

    Args:
        agvm: whose progress.
        hook: that calls this; the trainer's checkpointer, evaluation and writer come after it.
        resumed: AGVM's state was loaded.
    """

    def __init__(self, agvm: AGVM, hook: HookBase, resumed: bool):
        self._agvm, self._trainer = agvm, hook.trainer
        agvm.max_iter = self._max_iter = self._trainer.max_iter
        if not self._trainer.start_iter:
            agvm.restart()
        elif not resumed and not agvm.progress:
            raise ValueError(NO_PROGRESS)
        agvm.settings.check_gain(agvm.batch_size, self._max_iter)
        self._hooks: list[Any] = list(getattr(self._trainer, "_hooks", ()))
        for other in self._hooks:
            if other is hook:
                break
            if isinstance(other, ASK):
                raise ValueError(
                    "AGVM.SCHEDULE gain: AGVMHook is registered after "
                    f"{type(other).__name__}, which then cannot know which iteration is the last. "
                    "Register AGVMHook right after hooks.LRScheduler."
                )
        schedulers = [h.scheduler for h in self._hooks if isinstance(h, hooks.LRScheduler)]
        if not schedulers:
            raise ValueError(
                "AGVM.SCHEDULE gain: the trainer has no hooks.LRScheduler, whose learning rates "
                "would follow progress. Register one, or set AGVM.SCHEDULE to iterations."
            )
        for scheduler in schedulers:
            agvm.follow(scheduler)
        if agvm.done:  # a resume of a run that ended
            self._set_max_iter(self._trainer.start_iter)

    def before_step(self) -> None:
        """
        Raises:
            TrainingDone: the iteration before was the last.
        """
        if self._agvm.done:
            raise TrainingDone

    def after_step(self) -> None:
        """An iteration's step was taken, and the hooks that ask whether it is the last come now."""
        agvm, done = self._agvm, self._trainer.iter + 1
        if agvm.done:
            self._set_max_iter(done)
        else:  # for the ETA
            left = (self._max_iter - agvm.progress) / agvm.gain
            self._set_printers(done + math.ceil(left))

    def _set_max_iter(self, max_iter: int) -> None:
        self._trainer.max_iter = max_iter
        for hook in self._hooks:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_iter = max_iter
        self._set_printers(max_iter)

    def _set_printers(self, max_iter: int) -> None:
        """Where Detectron2's printer of the ETA keeps it elsewhere, the ETA is that of MAX_ITER."""
        for hook in self._hooks:
            for writer in getattr(hook, "_writers", ()):
                if hasattr(writer, "_max_iter"):
                    writer._max_iter = max_iter
