"""The toy detector in Detectron2's trainers, and a small config of the real one."""

from __future__ import annotations
from detectron2.config import get_cfg
from detectron2.utils import comm
from helpers import RCNN_BASE
from toy import ToyDetector, batch

from agvm_d2 import AGVMHook, AGVMTrainer, add_agvm_config
from agvm_d2.modules import unwrap


def merge(cfg, options):
    """Options as SOLVER__BASE_LR=0.1."""
    cfg.merge_from_list([x for k, v in options.items() for x in (k.replace("__", "."), v)])
    return cfg


def toy_config(output_dir, **options):
    """A config for ToyTrainer."""
    cfg = get_cfg()
    add_agvm_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = str(output_dir)
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.MAX_ITER = 10
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.CHECKPOINT_PERIOD = 1000
    cfg.DATASETS.TEST = ()
    cfg.AGVM.START_ITER = 2
    cfg.AGVM.INTERVAL = 2
    cfg.AGVM.MOMENTUM = 0.5
    return merge(cfg, options)


def rcnn_config(output_dir, **options):
    """A config for RCNNTrainer: the thin Faster R-CNN on the digits, four images an iteration."""
    cfg = toy_config(output_dir)
    cfg.merge_from_file(RCNN_BASE)
    cfg.OUTPUT_DIR = str(output_dir)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.MICRO_BATCH_SIZE = 0
    cfg.DATASETS.TEST = ()
    cfg.DATALOADER.NUM_WORKERS = 0
    return merge(cfg, options)


class ToyLoader:
    """Batch i is a function of i alone; each worker takes its share. No end."""

    def __init__(self, size: int, rank: int = 0, num_workers: int = 1):
        self.size, self.rank, self.num_workers = size, rank, num_workers

    def __iter__(self):
        i, share = 0, self.size // self.num_workers
        while True:
            yield batch(self.size, seed=1000 + i)[self.rank * share :][:share]
            i += 1


class ToyTrainer(AGVMTrainer):
    @classmethod
    def build_model(cls, cfg):
        return ToyDetector()

    @classmethod
    def build_train_loader(cls, cfg):
        return ToyLoader(cfg.SOLVER.IMS_PER_BATCH, comm.get_rank(), comm.get_world_size())


class RCNNTrainer(AGVMTrainer):
    """A real detector, never evaluated."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        raise NotImplementedError


def train(cfg, trainer_class=ToyTrainer, resume: bool = False):
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def weights(trainer) -> dict:
    return {k: v.clone() for k, v in unwrap(trainer.model).state_dict().items()}


def agvm_hook(trainer) -> AGVMHook:
    (hook,) = (h for h in trainer._hooks if isinstance(h, AGVMHook))
    return hook
