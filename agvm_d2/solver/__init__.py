"""Optimizers, clipping and learning-rate schedules by this package's config keys."""

from ..param_groups import fit_loaded_state, split_param_groups
from ..progress import fit_scheduler
from .build import build_optimizer, prepare_optimizer, unsplit_optimizer
from .clip import clip_gradients, skip_nonfinite_steps
from .muon import build_muon, muon_params
from .schedule import adam_scaled, build_lr_scheduler, exp_warmup, scaled_lr

__all__ = [
    "adam_scaled",
    "build_lr_scheduler",
    "build_muon",
    "build_optimizer",
    "clip_gradients",
    "exp_warmup",
    "fit_loaded_state",
    "fit_scheduler",
    "muon_params",
    "prepare_optimizer",
    "scaled_lr",
    "skip_nonfinite_steps",
    "split_param_groups",
    "unsplit_optimizer",
]
