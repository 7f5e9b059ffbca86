"""The public place of `agvm_d2.d2.loader`'s names; `TrainLoader` is version 0.1's."""

from .d2.loader import BadImageError, ResumableLoader, build_train_loader

TrainLoader = ResumableLoader

__all__ = ["BadImageError", "ResumableLoader", "TrainLoader", "build_train_loader"]
