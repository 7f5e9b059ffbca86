"""What this package adds to a run, the same for a yacs config and a LazyConfig."""

from __future__ import annotations
import dataclasses
from collections.abc import Iterable
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm

from ..modules import ModulePatterns
from .loader import IterationSeeder, ResumableLoader, shared_seed
from .micro_batches import in_micro_batches, split_batch


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options of a run that concern more than one of its parts.

    >>> options = RunOptions(batch_size=64, micro_batch_size=16)
    >>> options.micro_batches
    4
    """

    batch_size: int  # images of one iteration, over all workers
    micro_batch_size: int = 0  # images of one pass of one worker; 0: the worker's share
    skip_nonfinite: bool = False
    seed: int = -1  # below 0: drawn anew
    modules: ModulePatterns | None = ()  # to split param groups by; None: without AGVM

    @property
    def micro_batches(self) -> int:
        """Passes of one worker in one iteration."""
        return split_batch(self.batch_size, self.micro_batch_size, comm.get_world_size())

    def prepare_trainer(self, trainer: SimpleTrainer) -> SimpleTrainer:
        """The trainer, or a MicroBatchTrainer in its place where these options need one.

        Raises:
            ValueError: they do, and the trainer has a step of its own.
        """
        passes = self.micro_batches
        if passes == 1 and not self.skip_nonfinite:
            return trainer
        share = self.batch_size // comm.get_world_size()
        return in_micro_batches(trainer, share // passes, self.skip_nonfinite)

    def iteration_seeder(self, loader: Iterable[list[dict]]) -> IterationSeeder:
        """The hook that makes a resumed run go on with the images and random numbers it had."""
        if isinstance(loader, ResumableLoader):
            return IterationSeeder(loader)
        return IterationSeeder(None, shared_seed(self.seed))
