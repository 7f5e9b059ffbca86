"""AGVM in Detectron2's DefaultTrainer."""

from __future__ import annotations
import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, defaults, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    verify_results,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm

from ..progress import fit_scheduler
from ..shards import is_sharded
from ..solver import build_lr_scheduler, prepare_optimizer, unsplit_optimizer
from ..solver.build import clip_by_config
from .agreement import AgreementHook, check_agreement, code, flat
from .checkpoint import AtomicCheckpointer
from .checks import check_config, check_tta
from .gain_schedule import TrainingDone, ends_when_done
from .hook import AGVMHook
from .loader import ResumableLoader, check_resumable, patched, resumable_by
from .micro_batches import MicroBatchTrainer, micro_batches
from .needs import check_data, complete, evaluator_type, of_yacs
from .preemption import PreemptionHook
from .resume import ConfigRecord, check_not_done
from .run import RunOptions

logger = logging.getLogger("detectron2.agvm_d2")

d2_create_ddp_model = defaults.create_ddp_model


def create_ddp_model(model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
    """Detectron2's, for a CPU too: it gives DDP device_ids, which DDP refuses for such a model.

    Raises:
        ValueError: a sharded model.
    """
    if is_sharded(model):
        raise ValueError(
            "build_model has sharded the model (fully_shard), but DefaultTrainer puts it into "
            "DistributedDataParallel and saves it on one worker. Train it from a LazyConfig with "
            "train.fsdp, or in a loop of your own."
        )
    if next(model.parameters()).device.type == "cpu":
        kwargs["device_ids"] = None
    return d2_create_ddp_model(model, **kwargs)


def run_options(cfg: CfgNode) -> RunOptions:
    """Those of a yacs config."""
    return RunOptions(
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        micro_batch_size=cfg.SOLVER.MICRO_BATCH_SIZE,
        skip_nonfinite=cfg.SOLVER.ON_NONFINITE == "skip",
        seed=cfg.SEED,
        modules=cfg.AGVM.MODULES if cfg.AGVM.ENABLED else None,
    )


def _by_gain(cfg: CfgNode) -> bool:
    agvm = cfg.get("AGVM")
    return bool(agvm) and agvm.ENABLED and (agvm.SCHEDULE, agvm.MODE) == ("gain", "modulate")


if TYPE_CHECKING:  # what the mixin is mixed into
    from detectron2.engine import DefaultTrainer as _Trainer
else:
    _Trainer = object


class AGVMTrainerMixin(_Trainer):
    """Makes a DefaultTrainer an AGVM one: `class Trainer(AGVMTrainerMixin, TheirTrainer): pass`.

    The project's own optimizer, scheduler, model and hooks are kept; Detectron2's stock optimizer
    and scheduler give way to this package's, which know the keys of `add_agvm_config`.
    """

    _trainer: SimpleTrainer
    checkpointer: DetectionCheckpointer
    _record: ConfigRecord | None = None
    _agvm_hook: AGVMHook | None = None
    _preemption: PreemptionHook | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """
        Raises:
            TypeError: DefaultTrainer comes first, whose methods would hide these; or it is not
                Detectron2's.
        """
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        copies = [c for c in order if c.__name__ == "DefaultTrainer" and c is not DefaultTrainer]
        if copies and DefaultTrainer not in order:
            raise TypeError(
                f"class {cls.__name__}: {copies[0].__module__}.DefaultTrainer is a copy of "
                "Detectron2's, and AGVMTrainerMixin needs Detectron2's own. Give the copy an "
                "AGVMHook instead, as a loop of its own: docs/extending.md."
            )
        if DefaultTrainer in order[: order.index(AGVMTrainerMixin)]:
            raise TypeError(
                f"class {cls.__name__}: AGVMTrainerMixin must come before "
                f"{cls.__bases__[0].__name__}, or it does nothing: "
                f"class {cls.__name__}(AGVMTrainerMixin, {cls.__bases__[0].__name__})."
            )

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            ValueError: a bad config value, named by its key; a bad dataset; workers with other
                configs or code.
        """
        check_agreement({**code(), **flat(cfg)})
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_config(cfg, comm.get_world_size())
        build = getattr(type(self).build_evaluator, "__func__", None)
        stock = build is AGVMTrainer.build_evaluator.__func__  # type: ignore[attr-defined]
        needs = of_yacs(cfg, evaluators=stock)
        if needs is not None:
            mixed_in = AGVMTrainerMixin.build_evaluator.__func__  # type: ignore[attr-defined]
            needs.completed = stock or build is mixed_in
            theirs = [c for c in type(self).__mro__ if c not in (AGVMTrainerMixin, DefaultTrainer)]
            needs.own_mapper = any("build_train_loader" in vars(c) for c in theirs)
        check_data(needs, log=True)
        # What a project overrides is kept; what it leaves to Detectron2, also through super(), is
        # this package's. Its build_train_loader may not be this class's.
        ddp = patched(defaults, "create_ddp_model", create_ddp_model)
        with ddp, resumable_by(cfg) as made:
            super().__init__(cfg)
        check_resumable(
            self._trainer.data_loader,
            made,
            "DATALOADER.ON_BAD_IMAGE",
            cfg.DATALOADER.ON_BAD_IMAGE,
            "Where it gives lists of dicts, return "
            "agvm_d2.build_train_loader(cfg, mapper=...) in build_train_loader",
        )
        if micro_batches(cfg, comm.get_world_size()) > 1:
            if type(self).run_step is not DefaultTrainer.run_step:
                self._refuse_own_step(type(self).run_step)
        self._trainer = run_options(self.cfg).prepare_trainer(self._trainer)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Detectron2's SOLVER.REFERENCE_WORLD_SIZE, also for this package's iterations.

        AGVM.INTERVAL stays: it says how often to measure, whatever the batch, as in the paper. With
        AGVM.SCHEDULE gain only IMS_PER_BATCH changes: the gain scales the others.
        """
        before = cfg.SOLVER.REFERENCE_WORLD_SIZE
        if before not in (0, num_workers) and _by_gain(cfg):
            frozen, cfg = cfg.is_frozen(), cfg.clone()
            cfg.defrost()
            cfg.SOLVER.IMS_PER_BATCH = round(cfg.SOLVER.IMS_PER_BATCH * num_workers / before)
            cfg.SOLVER.REFERENCE_WORLD_SIZE = num_workers
            logger.info(f"Auto-scaling the config to batch_size={cfg.SOLVER.IMS_PER_BATCH}.")
            if frozen:
                cfg.freeze()
            return cfg
        if before not in (0, num_workers) and cfg.SOLVER.IMS_PER_BATCH % before:
            raise ValueError(
                f"SOLVER.REFERENCE_WORLD_SIZE: found {before}, but it must divide "
                f"SOLVER.IMS_PER_BATCH, {cfg.SOLVER.IMS_PER_BATCH}."
            )
        cfg = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if before in (0, num_workers) or "AGVM" not in cfg:
            return cfg
        frozen, scale = cfg.is_frozen(), before / num_workers
        cfg.defrost()
        for key in ("START_ITER", "STOP_ITER"):
            if cfg.AGVM[key] > 0:
                cfg.AGVM[key] = round(cfg.AGVM[key] * scale)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        clip.ITER_RANGE = tuple(round(i * scale) for i in clip.ITER_RANGE)
        if frozen:
            cfg.freeze()
        return cfg

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        clip, optimizer = cfg.SOLVER.CLIP_GRADIENTS, None
        if not (clip.ENABLED and clip.CLIP_TYPE == "relative"):
            try:
                optimizer = cls._their_optimizer(cfg, model)
            except ValueError as error:
                if "GradientClipType" not in str(error) or clip.CLIP_TYPE != "full_model":
                    raise
        if optimizer is None:  # a type that only this package's clipping knows
            unclipped = cfg.clone()
            unclipped.defrost()
            unclipped.SOLVER.CLIP_GRADIENTS.ENABLED = False
            optimizer = cls._their_optimizer(unclipped, model)
            clip_by_config(cfg, optimizer, model)
        return prepare_optimizer(cfg, optimizer, model)

    @classmethod
    def _their_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        with patched(defaults, "build_optimizer", unsplit_optimizer):
            return super().build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        try:
            with patched(defaults, "build_lr_scheduler", build_lr_scheduler):
                return super().build_lr_scheduler(cfg, optimizer)
        except (ValueError, IndexError) as error:
            if not cfg.AGVM.ENABLED or str(error).startswith("SOLVER."):
                raise
            raise ValueError(  # such as one function for each group
                f"The LR scheduler cannot be built: {error}. AGVM has split the optimizer's groups "
                f"by module, into {len(optimizer.param_groups)} param groups: a scheduler with a "
                "rule for each group must take the groups from optimizer.param_groups."
            ) from error

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        with resumable_by(cfg):
            return super().build_train_loader(cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, *args: Any, **kwargs: Any
    ) -> DatasetEvaluator:
        return complete(super().build_evaluator(cfg, dataset_name, *args, **kwargs))

    def _refuse_own_step(self, method: Callable) -> None:
        raise ValueError(
            f"SOLVER.MICRO_BATCH_SIZE: this project's {method.__qualname__} makes each step "
            "itself and does not know the key. Set it to 0 and train with several workers, or "
            "use agvm_d2.trainer.MicroBatchTrainer in the project."
        )

    def resume_or_load(self, resume: bool = True) -> None:
        """Detectron2's, where all workers would go on from the same checkpoint.

        Raises:
            ValueError: they would not, or it has more iterations than SOLVER.MAX_ITER.
        """
        last = self.checkpointer.get_checkpoint_file() if resume else ""
        check_agreement({"--resume": resume, "the checkpoint": os.path.basename(last)})
        super().resume_or_load(resume)
        groups, hook = self.optimizer.param_groups, self._agvm_hook
        check_agreement(  # a project's checkpointer may load the optimizer on one worker only
            {
                "learning rates after loading": [float(group["lr"]) for group in groups],
                "AGVM's factors after loading": hook and hook.modulator.factors.tolist(),
            }
        )
        check_not_done(self.start_iter, self.max_iter, "SOLVER.MAX_ITER")

    def build_hooks(self) -> list[HookBase | None]:
        if type(self.checkpointer) is DetectionCheckpointer:
            stock = self.checkpointer
            self.checkpointer = AtomicCheckpointer(
                self.model,
                stock.save_dir,
                save_to_disk=stock.save_to_disk,
                **stock.checkpointables,  # the trainer, and what the project adds, such as an EMA
            )
        built = super().build_hooks()
        enabled, loader = self.cfg.AGVM.ENABLED, self._trainer.data_loader
        seeder = run_options(self.cfg).iteration_seeder(loader)
        folder = self.cfg.OUTPUT_DIR
        record = ConfigRecord(self.cfg, self.optimizer, self.model, folder)
        self._record = record
        # A project's own loader keeps its random numbers, too, where nothing of AGVM is wanted.
        built[:0] = [record, seeder] if enabled or isinstance(loader, ResumableLoader) else [record]
        if enabled:
            # By type, not by index: rank 0 has more hooks than the other workers.
            place = [i for i, h in enumerate(built) if isinstance(h, hooks.LRScheduler)]
            hook = self._agvm_hook = AGVMHook(self.cfg, self.model, self.optimizer)
            built.insert(place[0] + 1 if place else 0, hook)
            # A project's own checkpointer may hold the optimizer, not the trainer with its hooks.
            saved = self.checkpointer.checkpointables
            if not any(isinstance(part, TrainerBase) for part in saved.values()):
                self.checkpointer.add_checkpointable("agvm", hook)
                self.checkpointer.add_checkpointable("iteration_seeder", seeder)
                # Loaded in this order, and the record comes before the optimizer.
                self.checkpointer.checkpointables = {"config_record": record, **saved}
        preemption = self._preemption = PreemptionHook(self.checkpointer)
        for built_hook in built:
            if isinstance(built_hook, hooks.EvalHook) and hasattr(built_hook, "_func"):
                built_hook._func = preemption.abortable(built_hook._func)
        return [preemption, AgreementHook(self.model), *built]

    def train(self) -> Any:
        try:
            with ends_when_done():
                return super().train()
        except TrainingDone:  # of a loop of the project's own
            if self._preemption and not self._preemption.over:
                with self.storage:
                    self.after_train()
            results = getattr(self, "_last_eval_results", None)
            if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
                verify_results(self.cfg, results)
            return results
        finally:
            if self._record:
                self._record.release()
            if self._preemption:  # after_train may not have come
                self._preemption.restore_signals()

    def after_step(self) -> None:
        super().after_step()
        inner = self._trainer
        if isinstance(inner, MicroBatchTrainer) and not inner.ran:
            if micro_batches(self.cfg, comm.get_world_size()) > 1:
                self._refuse_own_step(super().train)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if hasattr(self.scheduler, "last_epoch"):
            fit_scheduler(self.scheduler, self.iter + 1)


class AGVMTrainer(AGVMTrainerMixin, DefaultTrainer):
    """DefaultTrainer with AGVM, micro-batches, DDP on CPU and GPU, and Detectron2's evaluators; and
    test-time augmentation (TEST.AUG), which Detectron2 has in its tools/train_net.py.

    trainer = AGVMTrainer(cfg)  # with the keys of `add_agvm_config`
    trainer.resume_or_load(resume=False)
    trainer.train()
    """

    def build_hooks(self) -> list[HookBase | None]:
        built = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            check_tta(self.cfg)
            # Before the writer, which then has the results, too.
            places = [i for i, h in enumerate(built) if isinstance(h, hooks.PeriodicWriter)]
            preemption = next(h for h in built if isinstance(h, PreemptionHook))
            test = preemption.abortable(lambda: self.test_with_TTA(self.cfg, self.model))
            hook = hooks.EvalHook(0, test)
            built.insert(places[0] if places else len(built), hook)
        return built

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: torch.nn.Module) -> dict:
        """Results with test-time augmentation, their names with _TTA behind; see `check_tta`."""
        logger.info("Running inference with test-time augmentation ...")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": value for name, value in (results or {}).items()}

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Detectron2's evaluator(s) for the dataset's `evaluator_type`."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        kind = evaluator_type(dataset_name)
        evaluators: list[DatasetEvaluator] = []
        if kind in ("sem_seg", "coco_panoptic_seg"):
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        if kind in ("coco", "coco_panoptic_seg"):
            sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
            coco = COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas)
            evaluators.append(complete(coco))
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
