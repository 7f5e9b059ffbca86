"""The public names of `agvm_d2.d2` that stood here before version 0.2."""

from .d2.checks import check_config
from .d2.config import add_agvm_config, read_config

__all__ = ["add_agvm_config", "check_config", "read_config"]
