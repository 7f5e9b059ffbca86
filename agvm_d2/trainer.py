"""AGVM and micro-batches in Detectron2's trainers."""

from __future__ import annotations
import contextlib
import os
import time
from collections.abc import Callable
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, defaults, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import SafeCheckpointer
from .config import check_config, micro_batches
from .hook import AGVMHook
from .loader import RandomState, TrainLoader, build_train_loader
from .modules import unwrap
from .solver import build_lr_scheduler, prepare_optimizer, unsplit_optimizer


class MicroBatchTrainer(SimpleTrainer):
    """SimpleTrainer (AMPTrainer, with a GradScaler) that cuts each batch into micro-batches.

    Gradients are averaged by image count, so a step is that of the whole batch (up to layers and
    losses that look at several images, such as BatchNorm). DDP communicates once, in the last pass.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
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
            skip_nonfinite: go on where the loss is NaN or inf, as `skip_nonfinite_steps` does.
        """
        super().__init__(model, data_loader, optimizer)
        self.micro_batch_size = micro_batch_size
        self.grad_scaler = grad_scaler
        self.precision = precision
        self.skip_nonfinite = skip_nonfinite
        self._names = ["total_loss"]  # of the losses

    def run_step(self) -> None:
        assert self.model.training, "[MicroBatchTrainer] model was changed to eval mode!"
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
            with self.model.no_sync() if ddp and not last else contextlib.nullcontext():
                losses = self._losses(piece)
                loss = sum(losses.values()) * weight
                (self.grad_scaler.scale(loss) if self.grad_scaler else loss).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() * weight
            self.after_micro_batch(weight)
        self.after_backward()
        self._write_metrics(totals, data_time)
        if self.grad_scaler:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()

    def _losses(self, piece) -> dict[str, torch.Tensor]:
        try:
            losses = self._forward(piece)
        except FloatingPointError:  # Detectron2's RPN, at NaN or inf
            if not self.skip_nonfinite:
                raise
            losses = self._nan_losses(piece)
        self._names = list(losses)
        return losses

    def _nan_losses(self, piece) -> dict[str, torch.Tensor]:
        """Through the model, so that DDP's other workers, too, get a gradient and skip the step."""
        model = unwrap(self.model)

        def forward(_) -> dict[str, torch.Tensor]:
            nan = sum(p.sum() for p in model.parameters() if p.requires_grad) * torch.nan
            return dict.fromkeys(self._names, nan)

        model.forward = forward
        try:
            return self.model(piece)
        finally:
            del model.forward

    def _forward(self, piece) -> dict[str, torch.Tensor]:
        if self.precision is None:
            losses = self.model(piece)
        else:
            device = next(self.model.parameters()).device.type
            with torch.autocast(device, dtype=self.precision):
                losses = self.model(piece)
        return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _write_metrics(self, *args, **kwargs) -> None:
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
    """
    Raises:
        ValueError: a trainer with a step of its own.
    """
    if type(inner) not in (SimpleTrainer, AMPTrainer):
        raise ValueError(
            "SOLVER.MICRO_BATCH_SIZE, SOLVER.ON_NONFINITE: they need Detectron2's SimpleTrainer or "
            f"AMPTrainer, but this project runs its own {type(inner).__name__}. Leave them at 0 "
            'and "stop", or build agvm_d2.trainer.MicroBatchTrainer in the project.'
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
    if hasattr(inner, "gather_metric_period"):  # not in older Detectron2
        trainer.gather_metric_period = inner.gather_metric_period
    return trainer


d2_create_ddp_model = defaults.create_ddp_model


def create_ddp_model(model: torch.nn.Module, **kwargs) -> torch.nn.Module:
    """Detectron2's, for a CPU too: it gives DDP device_ids, which DDP refuses for such a model."""
    if next(model.parameters()).device.type == "cpu":
        kwargs["device_ids"] = None
    return d2_create_ddp_model(model, **kwargs)


@contextlib.contextmanager
def _patched(name: str, function: Callable):
    """DefaultTrainer calls `function` where it calls Detectron2's of this name: what a project
    overrides is kept, and what it leaves to Detectron2, also through super(), is this package's."""
    before = getattr(defaults, name)
    setattr(defaults, name, function)
    try:
        yield
    finally:
        setattr(defaults, name, before)


class AGVMTrainerMixin:
    """Makes a DefaultTrainer an AGVM one: `class Trainer(AGVMTrainerMixin, TheirTrainer): pass`.

    The project's own optimizer, scheduler, model and hooks are kept; Detectron2's stock optimizer
    and scheduler give way to this package's, which know the keys of `add_agvm_config`.
    """

    def __init__(self, cfg):
        """
        Raises:
            ValueError: a bad config value, named by its key.
        """
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_config(cfg, comm.get_world_size())
        with _patched("create_ddp_model", create_ddp_model):
            super().__init__(cfg)
        solver, workers = self.cfg.SOLVER, comm.get_world_size()
        skip = solver.ON_NONFINITE == "skip"
        if micro_batches(self.cfg, workers) > 1 or skip:
            size = solver.MICRO_BATCH_SIZE or solver.IMS_PER_BATCH // workers
            self._trainer = in_micro_batches(self._trainer, size, skip)

    @classmethod
    def build_optimizer(cls, cfg, model):
        with _patched("build_optimizer", unsplit_optimizer):
            optimizer = super().build_optimizer(cfg, model)
        return prepare_optimizer(cfg, optimizer, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        with _patched("build_lr_scheduler", build_lr_scheduler):
            return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        with _patched("build_detection_train_loader", build_train_loader):
            return super().build_train_loader(cfg)

    def build_hooks(self):
        if type(self.checkpointer) is DetectionCheckpointer:
            stock = self.checkpointer
            self.checkpointer = SafeCheckpointer(
                self.model,
                stock.save_dir,
                save_to_disk=stock.save_to_disk,
                **stock.checkpointables,  # the trainer, and what the project adds, such as an EMA
            )
        built = super().build_hooks()
        loader = self._trainer.data_loader
        resumable = isinstance(loader, TrainLoader)
        built.insert(0, RandomState(loader) if resumable else RandomState(None, self._seed()))
        if self.cfg.AGVM.ENABLED:
            # By type, not by index: rank 0 has more hooks than the other workers.
            place = [i for i, h in enumerate(built) if isinstance(h, hooks.LRScheduler)]
            built.insert(
                place[0] + 1 if place else 0, AGVMHook(self.cfg, self.model, self.optimizer)
            )
        return built

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # A checkpoint saved without AGVM has fewer learning rates: one for each group unsplit.
        groups = self._trainer.optimizer.param_groups
        if hasattr(self.scheduler, "base_lrs") and len(self.scheduler.base_lrs) != len(groups):
            self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
            self.scheduler._last_lr = [group["lr"] for group in groups]

    def _seed(self) -> int:
        return self.cfg.SEED if self.cfg.SEED >= 0 else comm.shared_random_seed()


class AGVMTrainer(AGVMTrainerMixin, DefaultTrainer):
    """DefaultTrainer with AGVM, micro-batches, DDP on CPU and GPU, and Detectron2's evaluators."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str, output_folder: str | None = None):
        """Detectron2's evaluator(s) for the dataset's `evaluator_type`."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        evaluators = []
        if kind in ("sem_seg", "coco_panoptic_seg"):
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        if kind in ("coco", "coco_panoptic_seg"):
            evaluators.append(COCOEvaluator(dataset_name, output_dir=folder))
        if kind == "coco_panoptic_seg":
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        if kind == "pascal_voc":
            evaluators.append(PascalVOCDetectionEvaluator(dataset_name))
        if kind == "lvis":
            evaluators.append(LVISEvaluator(dataset_name, output_dir=folder))
        if not evaluators:
            raise NotImplementedError(
                f"No evaluator for dataset '{dataset_name}' of evaluator_type '{kind}': override "
                "build_evaluator."
            )
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
