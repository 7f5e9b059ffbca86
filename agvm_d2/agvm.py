"""AGVM around any PyTorch training loop: measures on some iterations and scales each module's
learning rate inside `optimizer.step`. Knows nothing of Detectron2."""

from __future__ import annotations
import logging
import math
from typing import Any
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .modulator import Modulator
from .modules import uncompiled
from .moments import CommHook, GradientTap, TensorTap
from .norms import Modules
from .param_groups import (
    is_zero,
    module_of_groups,
    require_called_hooks,
    require_hooks,
    stepped_by,
    stepped_modules,
)
from .precondition import preconditioner
from .progress import Progress
from .rules import RULES
from .settings import Settings
from .sharded import ShardedTap
from .shards import check_sharding, is_sharded, reshard

logger = logging.getLogger("detectron2.agvm_d2")  # takes Detectron2's handlers where it is used

NO_PROGRESS = (
    "AGVM.SCHEDULE gain: the checkpoint was saved without AGVM, or by version 0.1, and does not "
    "say how many iterations of the base batch its steps are worth. Resume with AGVM.SCHEDULE "
    "iterations, or start anew from these weights, without --resume."
)


class AGVM:
    """Adaptive Gradient Variance Modulator (NeurIPS 2022, arXiv 2210.11078).

        split_param_groups(optimizer, model)  # before the LR scheduler is built
        agvm = AGVM(model, optimizer)         # the model inside DistributedDataParallel
        for iteration, data in enumerate(loader):
            agvm.begin(iteration)
            loss(model, data).backward()      # several: agvm.micro_batch_done(weight) after each
            agvm.backward_done()              # before clipping
            optimizer.step()                  # with each module's learning rate times its factor
            agvm.end()

    `modulator` holds the factors, `measured` says whether the last iteration was measured, and
    `num_units` is K, the gradients that an iteration compares: workers x micro-batches.

    With `schedule="gain"` the learning rates and the end of training are those of
    `base_batch_size`, and progress decides on both: `follow(scheduler)`, and `while not agvm.done`.

    Args:
        model: the model being trained; with several workers, inside DistributedDataParallel or
            under FSDP2's `fully_shard`.
        optimizer: its optimizer, each group of one module (`split_param_groups`).
        settings: AGVM's options; a `start_iter` of -1 is 0 here.
        micro_batches: backward passes of one worker in one iteration.
        batch_size: images of one iteration over all workers. Without it there is no gain, and
            the noise scale is NaN.
        max_iter: iterations of training; with `schedule="gain"`, those of the base batch.
        comm_hook: (state, hook), DDP's communication hook to run under the measurement, such as
            (None, default_hooks.fp16_compress_hook); DDP takes only one, so give it here.

    Raises:
        TypeError: an optimizer without hooks.
        ValueError: a bad module pattern or anchor, a group of several modules, an optimizer of
            another model, a bad setting, a model sharded in another way (`shards.check_sharding`),
            a gain without `batch_size`; `schedule="gain"` with a batch below the base's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings | None = None,
        *,
        micro_batches: int = 1,
        batch_size: int | None = None,
        max_iter: int | None = None,
        comm_hook: CommHook | None = None,
    ):
        require_hooks(optimizer)
        self.settings = settings = (settings or Settings()).check()
        if is_sharded(model):
            reshard(model)
            check_sharding(model, optimizer)
        self.model, self.optimizer = model, optimizer
        self.micro_batches, self.batch_size = micro_batches, batch_size
        self.modules = stepped_modules(model, optimizer, settings.modules)
        workers = dist.get_world_size() if dist.is_initialized() else 1
        self.num_units = workers * micro_batches
        names = list(self.modules)
        self.modulator = Modulator(
            names,
            RULES[settings.rule](settings, names, batch_size),
            settings.momentum,
            settings.interval,
            max(settings.start_iter, 0),
            settings.stop_iter,
        )
        share = settings.base_batch_size / (batch_size or settings.base_batch_size)
        settings.check_gain(batch_size)
        # Without the gain's rates the base batch may be any, also a larger one.
        self._progress = Progress(len(names), min(share, 1.0), settings.momentum, max_iter)
        self.measured = False
        self.tap: GradientTap | None = None
        self._comm_hook = comm_hook
        self._group_module = module_of_groups(optimizer, self.modules)
        self._handles: list[Any] = []
        self._iteration, self._depth = -1, 0
        self._wanted = self._warned = False  # a measurement; a warning has been given
        self._rehearsal = True
        self._weights: list[float] = []  # of the iteration's micro-batches, where it is measured
        self._stepped = True  # since the last iteration began
        self._saved_lrs: list[Any] | None = None

    def attach(self) -> bool:
        """Listen to DDP and the optimizer, as the first `begin` does; False, with a warning, where
        an iteration has only one gradient and so no variance; ValueError, where that decides on the
        schedule. See also `build_tap`."""
        if not self._handles:
            self._handles = [
                self.optimizer.register_step_pre_hook(self._before_optimizer_step),
                self.optimizer.register_step_post_hook(self._after_optimizer_step),
            ]
            if self.num_units < 2:
                needs = (
                    "AGVM needs at least two gradients in an iteration to measure a variance, but "
                    "there is one worker and one micro-batch"
                )
                way_out = (
                    "Use two or more workers (--num-gpus 2), or micro-batches of at most half of "
                    "the batch: SOLVER.MICRO_BATCH_SIZE (train.micro_batch_size), or in a loop of "
                    "your own MicroBatchTrainer with AGVMHook(micro_batches=)."
                )
                if self.settings.by_gain:
                    raise ValueError(f"AGVM.SCHEDULE gain: {needs}. {way_out}")
                logger.warning(f"{needs}: training goes on with factors of 1. {way_out}")
            elif self.tap is None:
                self.tap = build_tap(
                    self.model,
                    self.modules,
                    self.micro_batches,
                    self.optimizer,
                    self.settings.estimator == "split",
                    self._comm_hook,
                )
        return self.tap is not None

    def detach(self) -> None:
        """Leave the optimizer as it was, also after an exception in the middle of a step."""
        self._restore_lrs()
        if self.tap is not None:
            self.tap.stop()  # without `collect`, for which the other workers may not be there
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # Training, in the order of events.

    def begin(self, iteration: int) -> None:
        """An iteration begins; `iteration` counts from 0 over the whole of training.

        The first one after `attach` is measured in any case, and thrown away: a loop that cannot be
        measured fails there, and not at `start_iter`.

        Raises:
            RuntimeError: the loop cannot be measured, a CUDA graph is being captured, or an old
                torch's torch.compile has taken the optimizer's hooks off.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "AGVM cannot measure while a CUDA graph is captured: its hooks would run now, and "
                "not when the graph is replayed. Capture at most the model "
                "(torch.cuda.make_graphed_callables), and leave AGVM, backward() and the "
                "optimizer's step outside of the graph."
            )
        require_called_hooks(self.optimizer)
        self.attach()
        if self._iteration < 0 and self.settings.by_gain and not self.follows:
            logger.warning(
                "AGVM.SCHEDULE gain: no LR scheduler follows progress, see AGVM.follow(scheduler). "
                "Without one the learning rate is to be set from AGVM.progress."
            )
        self._iteration, self._depth, self.measured = iteration, 0, False
        self._weights.clear()
        self._progress.begin()
        self._wanted = self.modulator.active(iteration) and (
            self._wanted or self.modulator.due(iteration)
        )
        if self.tap is not None and (self._wanted or self._rehearsal):
            if isinstance(self.tap, ShardedTap):
                reshard(self.model)
            self.tap.modules = self._update_modules()
            self.tap.start()
            if isinstance(self.tap, ShardedTap):  # whole gradients may be kept inside FSDP2
                self.tap.accumulated = not self._stepped
        self._stepped = False

    def micro_batch_done(self, weight: float) -> None:
        """One of several backward passes ended; its loss was multiplied by `weight`."""
        if self.tap is not None and self.tap.measuring:
            self._weights.append(weight)
            self.tap.unit_done(weight)

    def backward_done(self) -> None:
        """`.grad` holds the average over workers and micro-batches, not yet clipped or unscaled."""
        if self.tap is not None and self.tap.measuring:
            self.tap.average_done()

    def _before_optimizer_step(
        self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        # torch patches `step` once per class, so a subclass that calls super().step fires twice.
        self._depth += 1
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self._depth > 1 or self.tap is None:
            return None
        if closure is None:
            self._scale_lrs()
            return None

        def measured_closure() -> Any:  # the backward pass is inside the step
            loss = closure()
            self.backward_done()
            self._scale_lrs()
            return loss

        return args[:1], {**kwargs, "closure": measured_closure}

    def _scale_lrs(self) -> None:
        self._collect(stepping=True)
        active = self.settings.mode == "modulate" and self.modulator.active(self._iteration)
        if active and self._saved_lrs is None:
            groups, factors = self.optimizer.param_groups, self.modulator.factors.tolist()
            if len(groups) != len(self._group_module):  # some were added
                self._update_modules()
                self._group_module = module_of_groups(self.optimizer, self.modules)
            self._saved_lrs = [group["lr"] for group in groups]
            for group, module in zip(groups, self._group_module, strict=True):
                if module >= 0:
                    group["lr"] = group["lr"] * factors[module]  # a new object: lr may be a tensor

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._depth -= 1
        self._stepped = True
        if self._depth == 0:
            self._restore_lrs()
            groups = self.optimizer.param_groups  # without gradients where the step was left out
            stepped = any(p.grad is not None for group in groups for p in group["params"])
            overflow = getattr(optimizer, "found_inf", None)  # a GradScaler's word to a fused one
            self._count(stepped and not (overflow is not None and bool(overflow)))

    def _restore_lrs(self) -> None:
        if self._saved_lrs is not None:
            for group, lr in zip(self.optimizer.param_groups, self._saved_lrs, strict=True):
                group["lr"] = lr
            self._saved_lrs = None

    def follow(self, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Let the LR scheduler, which is stepped after each iteration, count progress; after a
        resume, too. Nothing with `schedule="iterations"`.

        Raises:
            ValueError: its rates do not follow from `last_epoch` alone.
        """
        if self.settings.by_gain:
            self._progress.follow(scheduler)

    def _count(self, stepped: bool) -> None:
        possible = stepped and self.modulator.active(self._iteration)
        gains = self.settings.mode == "modulate" and self.settings.rule != "variance"
        self._progress.count(possible and gains, possible)

    def restart(self) -> None:
        """Progress is 0 again, for training that begins anew."""
        self._iteration = -1
        self._progress.restart()

    @property
    def max_iter(self) -> int | None:
        """Iterations of training; with `schedule="gain"`, those of the base batch."""
        return self._progress.max_iter

    @max_iter.setter
    def max_iter(self, value: int) -> None:
        self._progress.max_iter = value

    @property
    def follows(self) -> bool:
        """Does an LR scheduler follow progress?"""
        return bool(self._progress.schedulers)

    @property
    def progress(self) -> float:
        """Iterations of the base batch that those made are worth. Where the schedule does not
        follow it, what they could be worth with the gain's learning rates."""
        progress = self._progress
        return progress.iterations if self.settings.by_gain else progress.possible

    @property
    def gain(self) -> float:
        """Iterations of the base batch that a step is, or could be, worth now."""
        return self._progress.gain if self.modulator.active(max(self._iteration, 0)) else 1.0

    @property
    def done(self) -> bool:
        """Is training at its end, `max_iter`?

        Raises:
            ValueError: there is no `max_iter`.
        """
        if self.max_iter is None:
            raise ValueError("AGVM.done needs max_iter, the iterations of training.")
        position = self._progress.iterations if self.settings.by_gain else 0.0
        return max(position, self._iteration + 1.0) >= self.max_iter

    def end(self) -> None:
        """The iteration ended.

        Raises:
            RuntimeError: it has not begun.
        """
        if not self._handles:
            raise RuntimeError("AGVM.end() without begin(iteration), which comes before forward().")
        self._count(stepped=False)
        self._collect(stepping=False)
        if self.tap is not None:
            self.tap.stop()

    def _collect(self, stepping: bool) -> None:
        """Take the measurement in, if there is one."""
        if self.tap is None or not self.tap.measuring or not (stepping or self.tap.seen):
            return
        if self._rehearsal:
            self._rehearsal = not self._check_loop(self.tap)
            if not self._wanted:
                return self.tap.stop()
        moments = self.tap.collect()
        if moments is not None:
            self.modulator.update(moments)
            self._progress.update(moments)
            finite = bool(moments.mean_sq.isfinite().all())
            # Again where it overflowed, as a GradScaler's first do.
            self.measured, self._wanted = True, not finite
            accumulates = not stepping and finite
        if (moments is None or accumulates) and not self._warned:
            self._warned = True
            logger.warning(
                f"AGVM: iteration {self._iteration} added its gradients to older ones, took no "
                "step, or had only one gradient, as a short last batch has. If this project "
                "accumulates gradients over iterations, what is measured is one iteration's "
                "gradient, whenever it stands alone. Accumulate within an iteration "
                "(SOLVER.MICRO_BATCH_SIZE) to measure the whole batch of a step."
            )

    def _check_loop(self, tap: GradientTap) -> bool:
        """RuntimeError where this training loop cannot be measured; False where that is not known
        yet, since Adam's first gradients, over no second moments, are measured as 0."""
        passes = len(self._weights) or 1
        if passes != self.micro_batches:
            raise RuntimeError(
                f"AGVM was set up for {self.micro_batches} micro-batches, but this loop ran "
                f"{passes}, by its calls of micro_batch_done() (after_micro_batch()). Set "
                "micro_batches to what it runs. A loop of its own does not know "
                "SOLVER.MICRO_BATCH_SIZE: train with several workers, or build "
                "agvm_d2.trainer.MicroBatchTrainer in it."
            )
        total = math.fsum(self._weights)
        if self._weights and not math.isclose(total, 1, rel_tol=1e-3):
            raise RuntimeError(
                f"AGVM: the weights given to micro_batch_done() (after_micro_batch()) add up to "
                f"{total:g}, but must to 1: each is the share by which its pass's loss was "
                "multiplied, such as 1/4 of 4 equal passes."
            )
        rows, units = tap.local()
        alone = not isinstance(uncompiled(self.model), DistributedDataParallel)
        alone = alone and not isinstance(tap, ShardedTap)
        if not alone or tap.workers == 1 or units > 1:
            return True
        if bool(rows[0].any()) and torch.equal(rows[0], rows[1]):
            raise RuntimeError(
                "AGVM: the gradient was not averaged over the workers before backward_done() "
                "(after_backward()). Give AGVM the model inside DistributedDataParallel."
            )
        return bool(rows[0].any())

    def _update_modules(self) -> Modules:
        """Parameters may have been unfrozen since the last measurement."""
        known = {p for params in self.modules.values() for p in params}
        new = {p for p in self.model.parameters() if p.requires_grad} - known
        if not new or new.isdisjoint(stepped_by(self.optimizer)):
            return self.modules
        modules = stepped_modules(self.model, self.optimizer, self.settings.modules)
        if not set(modules) <= set(self.modules):
            raise ValueError(
                f"AGVM was set up for the modules {', '.join(self.modules)}, but now there are "
                f"trainable parameters in {', '.join(modules)}. Unfreeze a module before AGVM is "
                "built, or build it anew."
            )
        self.modules = {name: modules.get(name, self.modules[name]) for name in self.modules}
        self._group_module = module_of_groups(self.optimizer, self.modules)
        return self.modules

    # What was found.

    def scalars(self) -> dict[str, float]:
        """agvm/KIND/MODULE -> value of the last measurement, without what was not measurable."""
        m, p = self.modulator, self._progress
        kinds = {
            "variance": dict(zip(m.names, m.variance.tolist(), strict=True)),
            "lr_scale": dict(zip(m.names, m.factors.tolist(), strict=True)),
            "noise_scale": m.noise_scale(self.batch_size),
        }
        named = {f"agvm/{kind}/{n}": v for kind, values in kinds.items() for n, v in values.items()}
        if self.batch_size and m.num_units:
            gains = zip([*m.names, "model"], p.gains.tolist(), strict=True)
            named.update(
                {f"agvm/gain/{n}": v for n, v in gains}, **{"agvm/progress": self.progress}
            )
        return {name: value for name, value in named.items() if value == value}  # not NaN

    def _rule(self) -> dict[str, Any]:
        """What the factors depend on."""
        settings, gain = self.settings, self.settings.rule == "gain"
        return {
            "rule": settings.rule,
            "anchor": settings.anchor,
            "ratio_range": [float(bound) for bound in settings.ratio_range],
            "base_batch_size": settings.base_batch_size,
            **({"batch_size": self.batch_size} if gain else {}),
        }

    def _unit(self) -> dict[str, Any]:
        """What the averages of the noise scale depend on."""
        images = self.batch_size / self.num_units if self.batch_size else None
        return {"images": images, "estimator": self.settings.estimator}

    def state_dict(self) -> dict:
        """What `load_state_dict` takes: the factors, the averages behind the noise scale, and
        progress."""
        parts = {
            "rule": self._rule(),
            "unit": self._unit(),
            "progress": self._progress.state_dict(),
            "wanted": self._wanted,  # a measurement that was due is still to be made
        }
        return {**self.modulator.state_dict(), **parts}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state. Factors of another rule, anchor or range start anew, as do
        averages of units of other sizes. ValueError where it was saved with other modules, or
        without the progress that `schedule="gain"` goes on from."""
        self.modulator.load_state_dict(state)
        if "progress" in state:
            self._progress.load_state_dict(state["progress"])
        elif self.settings.by_gain:
            raise ValueError(NO_PROGRESS)
        self._wanted = state.get("wanted", False)
        rule, unit = state.get("rule", self._rule()), state.get("unit", self._unit())
        changed = [key for key, value in self._rule().items() if rule.get(key, value) != value]
        if changed:
            self.modulator.factors.fill_(1)
            self._progress.gains.fill_(1)
            logger.warning(
                f"AGVM's factors were saved with {', '.join(f'{k} {rule[k]}' for k in changed)}: "
                "they start at 1 again."
            )
        if unit != self._unit():
            self.modulator.clear_averages()


def build_tap(
    model: nn.Module,
    modules: Modules,
    micro_batches: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    split: bool = False,
    inner: CommHook | None = None,
) -> GradientTap:
    """The cheapest tap that sees every unit.

    Args:
        optimizer: with Adam's, gradients are measured over its second moments.

    Raises:
        ValueError: what a sharded model cannot have; see `split.build_split_tap`.
    """
    precondition = preconditioner(optimizer) if optimizer is not None else None
    if is_sharded(model):
        for found, key, way in (
            (split, "AGVM.ESTIMATOR split", "use pairwise"),
            (inner is not None, "AGVMHook(comm_hook=)", "leave it out"),
        ):
            if found:
                raise ValueError(f"{key} is for DistributedDataParallel; sharded, {way}.")
        return ShardedTap(model, modules, precondition)
    if split:
        if precondition is not None and optimizer is not None and is_zero(optimizer):
            raise ValueError(
                "AGVM.ESTIMATOR split needs each worker to have all of Adam's second moments, "
                "which ZeroRedundancyOptimizer shares out: use pairwise."
            )
        from .split import build_split_tap

        return build_split_tap(model, modules, micro_batches, precondition, inner)
    model = uncompiled(model)
    if not isinstance(model, DistributedDataParallel):
        return TensorTap(modules, precondition)
    if inner is not None:
        model.register_comm_hook(*inner)
    one_pass = model if micro_batches == 1 else None
    return TensorTap(modules, precondition, model.process_group, one_pass)
