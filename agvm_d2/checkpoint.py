"""The public names of `agvm_d2.d2` that stood here before version 0.2."""

from .d2.checkpoint import AtomicCheckpointer

SafeCheckpointer = AtomicCheckpointer

__all__ = ["AtomicCheckpointer", "SafeCheckpointer"]
