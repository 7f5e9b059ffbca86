"""The public names of `agvm_d2.d2` that stood here before version 0.2."""

from .d2.loader import BadImageError, ResumableLoader, build_train_loader

TrainLoader = ResumableLoader

__all__ = ["BadImageError", "ResumableLoader", "TrainLoader", "build_train_loader"]
