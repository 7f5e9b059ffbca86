"""AGVMHook: measures on some iterations, scales learning rates around optimizer.step."""

from __future__ import annotations
import logging
import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from .config import ESTIMATORS, MODES, RULES
from .config import micro_batches as micro_batches_of
from .config import one_of
from .modulator import Modulator
from .modules import Rules, assign_modules
from .moments import adam_precondition, build_tap
from .variance import noise_scale

logger = logging.getLogger("detectron2.agvm_d2")  # takes Detectron2's handlers


class AGVMHook(HookBase):
    """Adaptive Gradient Variance Modulator (NeurIPS 2022, arXiv 2210.11078) as a Detectron2 hook.

    Every `interval` iterations it measures the gradient variance of each module, and in every
    iteration it multiplies the learning rates by the modules' factors for the one step. Register it
    right after `hooks.LRScheduler`. A loop without a trainer calls `before_train`, and in each
    iteration `before_step`, `after_backward` (before clipping) and `after_step`, inside an
    EventStorage.
    """

    @configurable
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        modules: Rules = (),
        anchor: str = "backbone",
        mode: str = "modulate",
        estimator: str = "pairwise",
        comm_hook: tuple | None = None,
        interval: int = 10,
        start_iter: int = 0,
        stop_iter: int = -1,
        momentum: float = 0.97,
        ratio_range: tuple[float, float] = (0.5, 10.0),
        rule: str = "variance",
        base_batch_size: int = 16,
        micro_batches: int = 1,
        batch_size: int | None = None,
        log_period: int = 20,
    ):
        """
        Args:
            model: the model being trained; with several workers, inside DistributedDataParallel.
            optimizer: its optimizer, each group of one module (`split_param_groups`).
            modules: rules as for `assign_modules`.
            mode: "modulate", or "monitor" to measure and log only.
            estimator: "pairwise", or "split", the paper's: halves of the workers, else of the
                micro-batches.
            comm_hook: (state, hook), DDP's communication hook to run under the measurement, such as
                (None, default_hooks.fp16_compress_hook); DDP takes only one, so give it here.
            rule: "variance", AGVM's, or "gain": each module's AdaScale gain, `lr_gain`.
            base_batch_size: for the gain, the batch that the optimizer's learning rate is for.
            micro_batches: backward passes of one worker in one iteration. Above 1 the training loop
                calls `after_micro_batch` after each, as `MicroBatchTrainer` does.
            batch_size: images of one iteration over all workers. Without it there is no gain, and
                the noise scale is not logged.
            log_period: iterations between two lines in the log.
            anchor, interval, start_iter, stop_iter, momentum, ratio_range: see `Modulator`.

        Raises:
            ValueError: a bad module rule or anchor, a group of several modules, an unknown mode,
                estimator or rule, a gain without `batch_size`.
        """
        one_of("AGVM.MODE", mode, MODES)
        one_of("AGVM.ESTIMATOR", estimator, ESTIMATORS)
        one_of("AGVM.RULE", rule, RULES)
        if rule == "gain" and not batch_size:
            raise ValueError("AGVMHook: rule 'gain' needs batch_size, the images of one iteration.")
        self._model = model
        self._optimizer = optimizer
        self._modules = assign_modules(model, modules)
        self._mode = mode
        self._split = estimator == "split"
        self._comm_hook = comm_hook
        self._micro_batches = micro_batches
        self._batch_size = batch_size
        self._log_period = log_period
        self.modulator = Modulator(
            list(self._modules),
            anchor,
            momentum,
            ratio_range,
            interval,
            start_iter,
            stop_iter,
            rule,
            base_batch_size / batch_size if batch_size else 1.0,
        )
        self._group_module = self._match_groups()
        self._tap = None
        self._handles: list = []
        self._depth = 0
        self._saved_lrs: list | None = None
        self._measured = False

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        agvm = cfg.AGVM
        start = agvm.START_ITER if agvm.START_ITER >= 0 else cfg.SOLVER.WARMUP_ITERS + 100
        return {
            "model": model,
            "optimizer": optimizer,
            "modules": agvm.MODULES,
            "anchor": agvm.ANCHOR,
            "mode": agvm.MODE,
            "estimator": agvm.ESTIMATOR,
            "interval": agvm.INTERVAL,
            "start_iter": start,
            "stop_iter": agvm.STOP_ITER,
            "momentum": agvm.MOMENTUM,
            "ratio_range": tuple(agvm.RATIO_RANGE),
            "rule": agvm.RULE,
            "base_batch_size": agvm.BASE_BATCH_SIZE,
            "micro_batches": micro_batches_of(cfg, comm.get_world_size()),
            "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        }

    def _match_groups(self) -> list[int]:
        """The module index of each param group; -1 for a group of frozen parameters."""
        owner = {p: i for i, ps in enumerate(self._modules.values()) for p in ps}
        matched = []
        for i, group in enumerate(self._optimizer.param_groups):
            found = sorted({owner[p] for p in group["params"] if p in owner})
            if len(found) > 1:
                names = [self.modulator.names[k] for k in found]
                raise ValueError(
                    f"Group {i} of the optimizer mixes the modules {', '.join(names)}, so they "
                    "cannot have learning rates of their own. Call "
                    "split_param_groups(optimizer, model) before the LR scheduler is built."
                )
            matched.append(found[0] if found else -1)
        return matched

    # Training, in the order of events.

    def before_train(self) -> None:
        workers = comm.get_world_size()
        units = workers * self._micro_batches
        sizes = ", ".join(
            f"{name} {sum(p.numel() for p in params):,}" for name, params in self._modules.items()
        )
        rule = self.modulator.rule
        logger.info(f"AGVM ({self._mode}, rule {rule}): parameters of each module: {sizes}")
        if units < 2:
            logger.warning(
                "AGVM needs at least two gradients in an iteration to measure a variance, but "
                "there is one worker and one micro-batch: training goes on with factors of 1. Use "
                "two or more workers (--num-gpus 2), or set SOLVER.MICRO_BATCH_SIZE below "
                "SOLVER.IMS_PER_BATCH."
            )
            return
        self._warn_of_no_effect()
        optimizer = self._optimizer
        # By name: Lamb is pytorch-optimizer's, and it keeps Adam's second moment too.
        adam = {"Adam", "AdamW", "Lamb"} & {c.__name__ for c in type(optimizer).__mro__}
        if self._tap is None:  # train() may be called again
            precondition = adam_precondition(optimizer) if adam else None
            self._tap = build_tap(
                self._model,
                self._modules,
                self._micro_batches,
                precondition,
                self._split,
                self._comm_hook,
            )
            # DefaultTrainer's inner trainer calls after_backward, on hooks of its own.
            inner = getattr(self.trainer, "_trainer", None)
            if inner is not None:
                inner.register_hooks([_Forward(self)])
        logger.info(
            f"AGVM: K = {workers} workers x {self._micro_batches} micro-batches = {units} "
            f"gradients, measured every {self.modulator.interval} iterations from "
            f"{self.modulator.start_iter} on, by {type(self._tap).__name__}"
            f"{', split in two halves' if self._split else ''}"
        )
        self._handles = [
            optimizer.register_step_pre_hook(self._before_optimizer_step),
            optimizer.register_step_post_hook(self._after_optimizer_step),
        ]

    def _warn_of_no_effect(self) -> None:
        modulator = self.modulator
        end = getattr(self.trainer, "max_iter", None)  # a plain loop has no trainer
        if 0 <= modulator.stop_iter <= modulator.start_iter:
            end = modulator.stop_iter
        if end is not None and modulator.start_iter >= end:
            logger.warning(
                f"AGVM starts at iteration {modulator.start_iter}, but ends, or training does, at "
                f"{end}: nothing will be measured. Set AGVM.START_ITER (start_iter) and STOP_ITER."
            )
        if modulator.rule == "gain" and modulator.base_share >= 1:
            logger.warning(
                f"AGVM.RULE gain: a batch of {self._batch_size} images is not above "
                "AGVM.BASE_BATCH_SIZE, so no learning rate will be raised."
            )

    def before_step(self) -> None:
        self._depth, self._measured = 0, False
        if self._tap is not None and self.modulator.due(get_event_storage().iter):
            self._tap.start()

    def after_micro_batch(self, weight: float) -> None:
        """One of several backward passes ended; its loss was multiplied by `weight`."""
        if self._tap is not None and self._tap.measuring:
            self._tap.unit_done(weight)

    def after_backward(self) -> None:
        """`.grad` holds the average over workers and micro-batches, not yet clipped or unscaled."""
        if self._tap is not None and self._tap.measuring:
            self._tap.average_done()

    def _before_optimizer_step(self, optimizer, args, kwargs) -> None:
        # torch patches `step` once a class, so a subclass that calls super().step fires twice.
        self._depth += 1
        if self._depth > 1:
            return
        if self._tap.measuring:
            self.modulator.update(self._tap.collect())
            self._measured = True
        if self._mode == "modulate" and self.modulator.active(get_event_storage().iter):
            self._saved_lrs = [group["lr"] for group in optimizer.param_groups]
            factors = self.modulator.factors.tolist()
            for group, module in zip(optimizer.param_groups, self._group_module, strict=True):
                if module >= 0:
                    group["lr"] = group["lr"] * factors[module]  # a new object: lr may be a tensor

    def _after_optimizer_step(self, optimizer, args, kwargs) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore_lrs()

    def _restore_lrs(self) -> None:
        if self._saved_lrs is not None:
            for group, lr in zip(self._optimizer.param_groups, self._saved_lrs, strict=True):
                group["lr"] = lr
            self._saved_lrs = None

    def after_step(self) -> None:
        if self._tap is None:
            return
        self._tap.stop()  # where a GradScaler skipped the step
        storage, modulator = get_event_storage(), self.modulator
        if self._measured:
            scalars = {
                "variance": zip(modulator.names, modulator.variance.tolist(), strict=True),
                "lr_scale": zip(modulator.names, modulator.factors.tolist(), strict=True),
                "noise_scale": self.noise_scale().items() if self._batch_size else (),
            }
            for kind, values in scalars.items():
                for name, value in values:
                    if value == value:  # NaN: no gradient, or not measurable
                        storage.put_scalar(f"agvm/{kind}/{name}", value, smoothing_hint=False)
        last = modulator.num_units and not modulator.variance.isnan().all()
        if last and modulator.active(storage.iter) and (storage.iter + 1) % self._log_period == 0:
            line = "  ".join(
                f"{name} {variance:.3f} x{factor:.3f}"
                for name, variance, factor in zip(
                    modulator.names, modulator.variance, modulator.factors, strict=True
                )
            )
            what = "LR factor" if self._mode == "modulate" else "LR factor, not used,"
            logger.info(f"AGVM: variance and {what}  {line}")

    def noise_scale(self) -> dict[str, float]:
        """B_simple of each module and of the whole "model" in images, from averaged moments; NaN
        where it is not measurable. With Adam it is that of the preconditioned gradients."""
        modulator, units = self.modulator, self.modulator.num_units
        unit_sq, mean_sq = (
            torch.cat([sq, sq.sum(0, keepdim=True)])
            for sq in (modulator.unit_sq, modulator.mean_sq)
        )
        values = noise_scale(unit_sq, mean_sq, units, self._batch_size / units)
        return dict(zip([*modulator.names, "model"], values.tolist(), strict=True))

    def after_train(self) -> None:
        """Leave the optimizer as it was, also after an exception in the middle of a step."""
        self._restore_lrs()
        if self._tap is not None:
            self._tap.stop()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict:
        return self.modulator.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.modulator.load_state_dict(state)


class _Forward(HookBase):
    """Passes an inner trainer's events on to an AGVMHook, which belongs to the outer one."""

    def __init__(self, hook: AGVMHook):
        self.after_backward = hook.after_backward
        self.after_micro_batch = hook.after_micro_batch
