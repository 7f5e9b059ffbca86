"""Large-batch training: the Adaptive Gradient Variance Modulator (AGVM), for Detectron2 and for any
PyTorch loop.

The algorithm, without Detectron2: gradients -> `norms` -> `moments` -> `variance` -> `rules` ->
`modulator` -> learning rates, in that order around a loop by `agvm`; beside it `settings`,
`modules`, `param_groups`, `split`, the paper's estimator, and `shards` and `sharded`, for FSDP2.
Detectron2's wing: `d2`, `solver`, `data`.
"""

from __future__ import annotations
import importlib
from typing import TYPE_CHECKING, Any

from .agvm import AGVM
from .param_groups import split_param_groups
from .settings import Settings
from .validate import INSTALL_DETECTRON2

if TYPE_CHECKING:
    from .d2.config import add_agvm_config
    from .d2.gain_schedule import ends_when_done
    from .d2.hook import AGVMHook
    from .d2.loader import build_train_loader
    from .d2.trainer import AGVMTrainer, AGVMTrainerMixin
    from .solver import build_optimizer

__version__ = "0.2.0"  # a literal: setup.cfg reads it without importing torch

__all__ = [
    "AGVM",
    "AGVMHook",
    "AGVMTrainer",
    "AGVMTrainerMixin",
    "Settings",
    "add_agvm_config",
    "build_optimizer",
    "build_train_loader",
    "ends_when_done",
    "split_param_groups",
]

_DETECTRON2 = {
    "AGVMHook": ".d2.hook",
    "AGVMTrainer": ".d2.trainer",
    "AGVMTrainerMixin": ".d2.trainer",
    "add_agvm_config": ".d2.config",
    "build_optimizer": ".solver",
    "build_train_loader": ".d2.loader",
    "ends_when_done": ".d2.gain_schedule",
}


def __getattr__(name: str) -> Any:
    """Import what needs Detectron2 when it is asked for."""
    if name not in _DETECTRON2:
        raise AttributeError(f"module 'agvm_d2' has no attribute '{name}'")
    try:
        return getattr(importlib.import_module(_DETECTRON2[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("detectron2", "yaml"):  # PyYAML comes with Detectron2
            raise
        raise ModuleNotFoundError(
            f"agvm_d2.{name} needs Detectron2, which is not installed: {INSTALL_DETECTRON2}",
            name="detectron2",
        ) from error
