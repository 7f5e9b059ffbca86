"""What trains: the older study's trainer on this one's images."""

from __future__ import annotations
import torch
from detectron2.config import CfgNode

from agvm_d2.d2.loader import build_train_loader
from benchmarks.study import run as study

from .scenes import Scenes


def mapper(cfg: CfgNode) -> Scenes:
    labels = {"PanopticFPN": "panoptic", "SemanticSegmentor": "sem_seg"}
    return Scenes(cfg.SEED, cfg.MODEL.MASK_ON, labels.get(cfg.MODEL.META_ARCHITECTURE, ""))


class Trainer(study.Trainer):
    @classmethod
    def build_model(cls, cfg):
        return super().build_model(cfg).to(memory_format=torch.channels_last)  # a sixth faster

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, mapper=mapper(cfg))
