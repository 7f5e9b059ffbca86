"""AGVM as a Detectron2 hook: its events, config, log and scalars."""

from __future__ import annotations
import dataclasses
import logging
import math
import statistics
from collections.abc import Sequence
from textwrap import indent
from typing import Any
import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ..agvm import AGVM
from ..modulator import Modulator
from ..modules import module_table
from ..moments import CommHook
from ..progress import fit_scheduler, foretell, signal_of
from ..settings import Settings
from ..validate import did_you_mean, is_int
from .checks import check_detectron2
from .gain_schedule import GainSchedule
from .micro_batches import micro_batches as micro_batches_of

logger = logging.getLogger("detectron2.agvm_d2")

SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))


def noise_summary(measured: Sequence[tuple[int, float]], batch: int, iterations: int) -> str:
    """What a monitored run says about its batch, in words.

    Args:
        measured: (iteration, noise scale in images of the module where it is smallest; NaN where
            noise drowned all gradients).
        batch: images of one iteration.
        iterations: of training.
    """
    noise = [images for _, images in measured]
    known = [images for images in noise if math.isfinite(images)]
    if 2 * len(known) < len(noise):
        return (
            f"noise drowns every module's gradient at batch {batch}, and a noise scale is known "
            f"from only {len(known)} of {len(noise)} measurements. A larger batch would save "
            "iterations; how many is not known."
        )
    # As agvm_d2.plan: what was not measurable is all noise.
    signal = [(i / iterations, signal_of([images])) for i, images in measured]

    def would(times: int) -> str:  # with so many times the batch
        left = foretell(signal, batch, times * batch, iterations) / iterations
        saved, read = 100 * (1 - left), times * left
        return f"save {saved:.0f} % of the iterations and read {read:.2f} times the images"

    return (
        f"the least noisy module has a noise scale of {statistics.median(known):,.0f} images at "
        f"batch {batch} (median of {len(known)} of {len(noise)} measurements). Trained by the "
        f"gain, twice the batch would {would(2)}; four times the batch would {would(4)}. "
        "`python -m agvm_d2.plan OUTPUT_DIR --batches N ...` says so for any batch."
    )


class AGVMHook(HookBase):
    """`agvm_d2.AGVM` in a Detectron2 trainer; register it right after `hooks.LRScheduler`.

        trainer.register_hooks([hooks.LRScheduler(), AGVMHook(model, optimizer, start_iter=1000)])

    A loop without a trainer calls `before_train`, and in each iteration `before_step`,
    `after_backward` (before clipping) and `after_step`, inside an EventStorage.

    With schedule="gain", `AGVMTrainerMixin` and LazyConfig's `do_train` end training where progress
    does; around another trainer's `train()` put `agvm_d2.ends_when_done()`.
    """

    @configurable
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batches: int = 1,
        batch_size: int | None = None,
        comm_hook: CommHook | None = None,
        log_period: int = 20,
        **settings: Any,
    ):
        """
        Args:
            model, optimizer, micro_batches, batch_size, comm_hook: as for `AGVM`. With
                `micro_batches` above 1 the training loop calls `after_micro_batch` after each, as
                `MicroBatchTrainer` does.
            log_period: iterations between two lines in the log.
            settings: fields of `Settings`, such as interval=5.

        Raises:
            TypeError: there is no such setting.
            ValueError: see `AGVM`.
            ImportError: see `check_detectron2`.
        """
        check_detectron2()
        for name in settings:
            if name not in SETTINGS:
                raise TypeError(f"AGVMHook: no argument '{name}'{did_you_mean(name, SETTINGS)}")
        self.agvm = AGVM(
            model,
            optimizer,
            Settings(**settings),
            micro_batches=micro_batches,
            batch_size=batch_size,
            comm_hook=comm_hook,
        )
        self._log_period = log_period
        self._heard_by: object = None  # the inner trainer
        self._schedule: GainSchedule | None = None
        self._loaded = False
        self._noise: list[tuple[int, float]] = []  # iteration, the smallest module's

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        settings = {name: cfg.AGVM[name.upper()] for name in SETTINGS}
        if settings["start_iter"] < 0 and settings["schedule"] != "gain":
            settings["start_iter"] = cfg.SOLVER.WARMUP_ITERS + 100
        return {
            "model": model,
            "optimizer": optimizer,
            "micro_batches": micro_batches_of(cfg, comm.get_world_size()),
            "batch_size": cfg.SOLVER.IMS_PER_BATCH,
            **settings,
        }

    @property
    def modulator(self) -> Modulator:
        return self.agvm.modulator

    def before_train(self) -> None:
        agvm, settings = self.agvm, self.agvm.settings
        self._schedule = None
        for other in getattr(getattr(self, "trainer", None), "_hooks", ()):  # a plain loop has none
            if isinstance(other, hooks.LRScheduler) and self.trainer.start_iter:
                fit_scheduler(other.scheduler, self.trainer.start_iter)
        table = indent(module_table(agvm.model, agvm.modules), "  ")
        logger.info(f"AGVM ({settings.mode}, rule {settings.rule}): modules\n{table}")
        if not agvm.attach():
            return
        self._warn_of_no_effect()
        self._compare_with_the_loader()
        # DefaultTrainer's inner trainer calls after_backward, on hooks of its own.
        inner = getattr(self.trainer, "_trainer", None)
        if inner is not None and inner is not self._heard_by:  # train() may be called again
            inner.register_hooks([_InnerTrainerEvents(self)])
            self._heard_by = inner
        split = ", split in two halves" if settings.estimator == "split" else ""
        logger.info(
            f"AGVM: K = {agvm.num_units // agvm.micro_batches} workers x {agvm.micro_batches} "
            f"micro-batches = {agvm.num_units} gradients, measured every {settings.interval} "
            f"iterations from {self.modulator.start_iter} on, by {type(agvm.tap).__name__}{split}"
        )

    def _warn_of_no_effect(self) -> None:
        modulator, settings = self.modulator, self.agvm.settings
        end = getattr(self.trainer, "max_iter", None)  # a plain loop has no trainer
        if 0 <= modulator.stop_iter <= modulator.start_iter:
            end = modulator.stop_iter
        if end is not None and modulator.start_iter >= end:
            logger.warning(
                f"AGVM starts at iteration {modulator.start_iter}, but ends, or training does, at "
                f"{end}: nothing will be measured. Set AGVM.START_ITER (start_iter) and STOP_ITER."
            )
        batch_size, base = self.agvm.batch_size, settings.base_batch_size
        # The base batch itself is what a plan is best made from.
        too_small = batch_size and base >= batch_size + (settings.mode == "monitor")
        if settings.rule == "gain" and too_small:
            logger.warning(
                f"AGVM.RULE gain: a batch of {batch_size} images is not above "
                f"AGVM.BASE_BATCH_SIZE, {base}, so no learning rate is raised. It is to be the "
                "batch that the config works at."
            )

    def _compare_with_the_loader(self) -> None:
        trainer, batch_size = getattr(self, "trainer", None), self.agvm.batch_size
        loader = getattr(getattr(trainer, "_trainer", trainer), "data_loader", None)
        images = getattr(loader, "batch_size", None)  # of Detectron2's and torch's, one worker's
        by_gain = self.agvm.settings.rule == "gain" and self.agvm.settings.mode == "modulate"
        if batch_size and by_gain and loader is not None and not is_int(images):
            logger.warning(
                f"AGVM.RULE gain: the training loader, {type(loader).__name__}, does not say how "
                f"many images it gives. Learning rates are raised as if it were {batch_size} per "
                "iteration, SOLVER.IMS_PER_BATCH (AGVMHook(batch_size=)): see that it is so, also "
                "where the project has keys of its own for its batch."
            )
        if batch_size and is_int(images) and images * comm.get_world_size() != batch_size:
            logger.warning(
                f"AGVM: the training loader gives {images} images to each of "
                f"{comm.get_world_size()} workers, but SOLVER.IMS_PER_BATCH "
                f"(AGVMHook(batch_size=)) is {batch_size}, by which the gain and the noise scale "
                "are reckoned. Set it to what the loader gives."
            )

    def before_step(self) -> None:
        if self.agvm.settings.by_gain:
            self._by_gain()
        self.agvm.begin(get_event_storage().iter)

    def _by_gain(self) -> None:
        if getattr(self, "trainer", None) is None:
            if not self.agvm.follows:
                raise ValueError(
                    "AGVM.SCHEDULE gain: a loop without a trainer gives its LR scheduler to "
                    "hook.agvm.follow(scheduler), sets hook.agvm.max_iter, and ends when "
                    "hook.agvm.done."
                )
            return
        if self._schedule is None:  # all hooks' before_train has made what it finds now
            self._schedule = GainSchedule(self.agvm, self, resumed=self._loaded)
        self._schedule.before_step()

    def after_micro_batch(self, weight: float) -> None:
        """One of several backward passes ended; its loss was multiplied by `weight`."""
        self.agvm.micro_batch_done(weight)

    def after_backward(self) -> None:
        """`.grad` holds the average over workers and micro-batches, not yet clipped or unscaled."""
        self.agvm.backward_done()

    def after_step(self) -> None:
        self.agvm.end()
        if self._schedule is not None:
            self._schedule.after_step()
        storage, modulator = get_event_storage(), self.modulator
        if self.agvm.measured:
            for name, value in self.agvm.scalars().items():
                storage.put_scalar(name, value, smoothing_hint=False)
            if self.agvm.batch_size and self.agvm.settings.mode == "monitor":
                modules = [n for name, n in self.noise_scale().items() if name != "model"]
                least = min(filter(math.isfinite, modules), default=math.nan)
                self._noise.append((storage.iter, least))
        found = modulator.num_units and not modulator.variance.isnan().all()
        if found and modulator.active(storage.iter) and (storage.iter + 1) % self._log_period == 0:
            line = "  ".join(
                f"{name} {variance:.3f} x{factor:.3f}"
                for name, variance, factor in zip(
                    modulator.names, modulator.variance, modulator.factors, strict=True
                )
            )
            used = self.agvm.settings.mode == "modulate"
            if self.agvm.batch_size:
                noise = self.noise_scale()["model"]
                line += "  noise scale of the model "
                line += "not measurable" if math.isnan(noise) else f"{noise:,.0f} images"
            if self.agvm.settings.by_gain:
                agvm = self.agvm
                line += f"  progress {agvm.progress:.0f} of {agvm.max_iter}, x{agvm.gain:.2f}"
            logger.info(f"AGVM: variance and LR factor{'' if used else ', not used,'}  {line}")

    def after_train(self) -> None:
        self.agvm.detach()
        agvm, batch_size = self.agvm, self.agvm.batch_size
        if self._schedule is not None and agvm.done:
            logger.info(
                f"AGVM: training ends after {self.trainer.iter} iterations, worth "
                f"{agvm.progress:.0f} of batch {agvm.settings.base_batch_size}."
            )
        if self._noise and batch_size:
            end = getattr(self.trainer, "max_iter", None) or self._noise[-1][0] + 1
            logger.info(f"AGVM, monitored: {noise_summary(self._noise, batch_size, end)}")
        self._noise = []

    def noise_scale(self) -> dict[str, float]:
        """Images, see `Modulator.noise_scale`."""
        return self.modulator.noise_scale(self.agvm.batch_size)

    def state_dict(self) -> dict:
        return self.agvm.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: the state was saved with other modules.
        """
        self.agvm.load_state_dict(state)
        self._loaded = True


class _InnerTrainerEvents(HookBase):
    """Passes an inner trainer's events on to an AGVMHook, which belongs to the outer one."""

    def __init__(self, hook: AGVMHook):
        self._hook = hook

    def after_backward(self) -> None:
        self._hook.after_backward()

    def after_micro_batch(self, weight: float) -> None:
        self._hook.after_micro_batch(weight)
