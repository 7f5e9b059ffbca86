"""Micro-batches: one iteration's images in several forward and backward passes of a worker."""

from __future__ import annotations
import contextlib
import time
from collections.abc import Iterable
from typing import Any, cast
import torch
from detectron2.config import CfgNode as CN
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..modules import unwrap
from ..shards import is_sharded
from ..solver.clip import skip_nonfinite_steps, step_left_out
from ..validate import is_int, require


def split_batch(
    batch: int,
    micro: int,
    num_workers: int,
    keys: tuple[str, str] = ("SOLVER.IMS_PER_BATCH", "SOLVER.MICRO_BATCH_SIZE"),
) -> int:
    """Forward/backward passes of one worker in one iteration.

    Args:
        batch, micro: images of an iteration, and of one pass on one worker (0: the worker's share).
        keys: their names in the config.

    Raises:
        ValueError: the batch cannot be cut into equal workers and micro-batches.
    """
    for key, value in zip(keys, (batch, micro), strict=True):
        require(is_int(value), key, value, "be a whole number of images")
    require(batch > 0, keys[0], batch, "be positive")
    require(
        batch % num_workers == 0,
        keys[0],
        batch,
        f"be divisible by the number of workers, {num_workers}",
    )
    require(micro >= 0, keys[1], micro, "be 0 (off) or positive")
    share = batch // num_workers
    require(
        micro == 0 or share % micro == 0,
        keys[1],
        micro,
        f"divide the images of one worker: {keys[0]} {batch} / {num_workers} workers = {share}",
    )
    return share // micro if micro else 1


def micro_batches(cfg: CN, num_workers: int) -> int:
    """`split_batch` of a config's keys."""
    return split_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MICRO_BATCH_SIZE, num_workers)


def autocast(
    device: torch.device | str, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager:
    """torch's; None: off."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return cast(torch.Tensor, sum(tensors))  # 0 only where there is none


STATIC_GRAPH = (
    "train.ddp.static_graph (DistributedDataParallel's static_graph): found True, but with "
    "SOLVER.MICRO_BATCH_SIZE (train.micro_batch_size) it must be False: all micro-batches but the "
    "last one run without DDP's averaging, which makes another graph."
)


class MicroBatchTrainer(SimpleTrainer):
    """SimpleTrainer (AMPTrainer, with a GradScaler) that cuts each batch into micro-batches.

    Gradients are averaged by image count, so a step is that of the whole batch (up to layers and
    losses that look at several images, such as BatchNorm). DDP communicates once, in the last pass.

        trainer = MicroBatchTrainer(model, data_loader, optimizer, micro_batch_size=16)
        trainer.register_hooks([hooks.LRScheduler(scheduler=scheduler)])
        trainer.train(0, max_iter)
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        micro_batch_size: int,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype | None = None,
        skip_nonfinite: bool = False,
    ):
        """
        Args:
            micro_batch_size: images of one forward and backward pass.
            grad_scaler: scales the loss, for float16.
            precision: dtype of autocast; None: off.
            skip_nonfinite: go on where the loss is NaN or inf, with `skip_nonfinite_steps`.

        Raises:
            ValueError: DDP with a static graph, and more than one pass.
        """
        super().__init__(model, data_loader, optimizer)
        one_pass = getattr(data_loader, "batch_size", None) == micro_batch_size
        if getattr(model, "static_graph", False) and not one_pass:
            raise ValueError(STATIC_GRAPH)
        self.micro_batch_size = micro_batch_size
        self.grad_scaler = grad_scaler
        self.precision = precision
        self.skip_nonfinite = skip_nonfinite
        if skip_nonfinite:
            skip_nonfinite_steps(optimizer, unwrap(model))
        self.ran = False  # a step
        self._names = ["total_loss"]  # of the losses
        self._sharded = is_sharded(model)

    def run_step(self) -> None:
        assert self.model.training, "[MicroBatchTrainer] model was changed to eval mode!"
        self.ran = True
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        if not data:  # DDP's other workers would wait for this one's backward pass
            raise ValueError("The data loader gave a batch of no images: give each worker some.")
        pieces = [
            data[i : i + self.micro_batch_size] for i in range(0, len(data), self.micro_batch_size)
        ]
        ddp = isinstance(self.model, DistributedDataParallel)
        self.optimizer.zero_grad()
        totals: dict[str, torch.Tensor] = {}
        for i, piece in enumerate(pieces):
            weight = len(piece) / len(data)
            last = i == len(pieces) - 1
            if self._sharded:  # shards are added up: whole gradients may not fit
                self.model.set_is_last_backward(last)
                self.model.set_requires_all_reduce(last)
            with self.model.no_sync() if ddp and not last else contextlib.nullcontext():
                losses = self._losses(piece)
                loss = _sum(losses.values()) * weight
                (self.grad_scaler.scale(loss) if self.grad_scaler else loss).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() * weight
            self.after_micro_batch(weight)
        self.after_backward()
        self._write_metrics(totals, data_time)
        if self.grad_scaler:
            self.grad_scaler.unscale_(self.optimizer)  # also a fused one's, for who clips
            self._scaled_step(self.grad_scaler)
        else:
            self.optimizer.step()

    def _scaled_step(self, scaler: torch.amp.GradScaler) -> None:
        # It skips a step in silence, unless the optimizer, a fused one, is to do so.
        counts = self.skip_nonfinite and not getattr(
            self.optimizer, "_step_supports_amp_scaling", False
        )
        before = scaler.get_scale() if counts else 0.0
        scaler.step(self.optimizer)
        scaler.update()
        if counts and scaler.get_scale() < before:
            step_left_out(self.optimizer)

    def _losses(self, piece: list[dict]) -> dict[str, torch.Tensor]:
        try:
            losses = self._forward(piece)
        except FloatingPointError as error:  # Detectron2's RPN, at NaN or inf
            if self.skip_nonfinite and self._sharded:
                raise FloatingPointError(
                    f"{error} With train.fsdp, train.on_nonfinite skip leaves out steps with a "
                    "gradient of NaN or inf, but not what the RPN raises: the other workers are in "
                    "a forward pass that all must make. Go on from the last checkpoint, with a "
                    "lower learning rate or gradients clipped."
                ) from error
            if not self.skip_nonfinite:
                raise
            losses = self._nan_losses(piece)
        self._names = list(losses)
        return losses

    def _nan_losses(self, piece: list[dict]) -> dict[str, torch.Tensor]:
        """Through the model, so that DDP's other workers, too, get a gradient and skip the step."""
        model = unwrap(self.model)

        def forward(_: Any) -> dict[str, torch.Tensor]:
            nan = _sum(p.sum() for p in model.parameters() if p.requires_grad) * torch.nan
            return dict.fromkeys(self._names, nan)

        model.forward = forward
        try:
            return self.model(piece)
        finally:
            del model.forward

    def _forward(self, piece: list[dict]) -> dict[str, torch.Tensor]:
        with autocast(next(self.model.parameters()).device, self.precision):
            losses = self.model(piece)
        return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _write_metrics(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._write_metrics(*args, **kwargs)
        except (FloatingPointError, KeyError):  # on the main process, when all losses are there
            if not self.skip_nonfinite:
                raise

    def after_micro_batch(self, weight: float) -> None:
        for hook in self._hooks:
            if hasattr(hook, "after_micro_batch"):
                hook.after_micro_batch(weight)

    def state_dict(self) -> dict:
        state = super().state_dict()
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def in_micro_batches(
    inner: SimpleTrainer, micro_batch_size: int, skip_nonfinite: bool = False
) -> MicroBatchTrainer:
    """A MicroBatchTrainer with the parts of one of Detectron2's trainers.

    Raises:
        ValueError: a trainer with a step of its own.
    """
    if type(inner) not in (SimpleTrainer, AMPTrainer):
        raise ValueError(
            "SOLVER.MICRO_BATCH_SIZE, SOLVER.ON_NONFINITE: they need Detectron2's SimpleTrainer or "
            f"AMPTrainer, but this project runs its own {type(inner).__name__}. Leave them at 0 "
            'and "stop", or build agvm_d2.trainer.MicroBatchTrainer in the project; what its own '
            "run_step does beside the step, such as clipping, is then to be done elsewhere: "
            "agvm_d2.solver.clip_gradients."
        )
    trainer = MicroBatchTrainer(
        inner.model,
        inner.data_loader,
        inner.optimizer,
        micro_batch_size,
        grad_scaler=getattr(inner, "grad_scaler", None),
        precision=getattr(inner, "precision", None),
        skip_nonfinite=skip_nonfinite,
    )
    trainer.gather_metric_period = inner.gather_metric_period
    return trainer
