"""Large-batch training for Detectron2: the Adaptive Gradient Variance Modulator (AGVM)."""

from .config import add_agvm_config
from .hook import AGVMHook
from .solver import build_optimizer, split_param_groups
from .trainer import AGVMTrainer, AGVMTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "AGVMHook",
    "AGVMTrainer",
    "AGVMTrainerMixin",
    "add_agvm_config",
    "build_optimizer",
    "split_param_groups",
]
