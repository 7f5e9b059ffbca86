"""The public place of `agvm_d2.d2`'s trainers."""

from .d2.micro_batches import MicroBatchTrainer, in_micro_batches
from .d2.trainer import AGVMTrainer, AGVMTrainerMixin, create_ddp_model

__all__ = [
    "AGVMTrainer",
    "AGVMTrainerMixin",
    "MicroBatchTrainer",
    "create_ddp_model",
    "in_micro_batches",
]
