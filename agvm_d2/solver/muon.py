"""SOLVER.OPTIMIZER MUON: Muon for the matrices inside the model, AdamW for all the rest.

It is pytorch-optimizer's, which does both in one optimizer: one list of param groups to split by
module, one state to save. torch.optim.Muon takes matrices only, no convolutions, and would need a
second optimizer beside it.
"""

from __future__ import annotations
import importlib.metadata
import logging
from typing import Any
import torch
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from ..param_groups import loading_as_torch

logger = logging.getLogger("detectron2.agvm_d2")

VERSION = (4, 1)  # of pytorch-optimizer: Muon's groups were made in another way before

SGDS_LR = 0.01  # and above: docs/evidence.md

# Predictors, by how the last word of their name ends: Detectron2's and its projects', and DETR's.
LAST = (
    "anchor_deltas", "bbox_embed", "bbox_pred", "class_embed", "cls_score", "ctrness", "logits",
    "lowres", "prediction", "predictor",
)  # fmt: skip


def muon_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights that Muon is made for: those of linear layers, of attention and of convolutions,
    each a matrix of one row per output channel (transposed convolution: input channel); but for
    embeddings and the last layers of predictors."""
    found, embeddings = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            found |= {getattr(module, name) for name in names} - {None}
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            if not _predicts(model, name):
                found.add(module.weight)
    return found - embeddings


def _predicts(model: nn.Module, name: str) -> bool:
    """Is it the last layer of a predictor, which may be one of a list, or an MLP as DETR's?"""
    words = [word for word in name.split(".") if not word.isdigit()]
    if words[-1:] == ["layers"]:
        layers = model.get_submodule(name.rpartition(".")[0])
        if [*layers.children()][-1] is model.get_submodule(name):
            words.pop()
    return words[-1:] != [] and words[-1].endswith(LAST)


def muon_groups(params: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """These param groups of `model`, each split in two where it must: `use_muon` says for which
    kind it is."""
    matrices = muon_matrices(model)
    groups = []
    for group in params:
        for use_muon in (True, False):
            kept = [p for p in group["params"] if (p in matrices) == use_muon]
            if kept:
                # Matrices one by one: batches of equal shapes would depend on the groups, and a
                # product's last bits on its batch.
                foreach = False if use_muon else None
                groups.append({**group, "params": kept, "use_muon": use_muon, "foreach": foreach})
    return groups


def muon_params(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Detectron2's `get_default_optimizer_params(model, **options)` as `build_muon` takes it, which
    is `optimizer.params` of a LazyConfig."""
    return muon_groups(get_default_optimizer_params(model, **options), model)


def check_kind(optimizer: torch.optim.Optimizer) -> None:
    """See that groups made for Muon are not another optimizer's.

    Raises:
        ValueError: they are torch's, which would take no notice.
    """
    of_torch = type(optimizer).__module__.startswith("torch.optim.")
    if of_torch and any("use_muon" in group for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: found {type(optimizer).__name__} with param groups made for Muon "
            "(muon_params). Set optimizer._target_ to agvm_d2.solver.build_muon, too, or "
            "optimizer.params._target_ to "
            "detectron2.solver.build.get_default_optimizer_params."
        )


def build_muon(
    params: list[dict[str, Any]],
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Muon, of Nesterov's kind. A model sharded by FSDP2, too: a step gathers one matrix at a time.

    A matrix's update is as large as AdamW's would be, 0.2 √max(rows, columns) times an orthogonal
    one (Liu et al. 2025, arXiv 2502.16982), so both kinds have AdamW's learning rate and weight
    decay.

    Args:
        params: see `muon_params`.
        momentum: Muon's.
        betas, eps: AdamW's.

    Raises:
        ValueError: pytorch-optimizer is not installed, or too old; groups of no kind.
    """
    try:
        found = importlib.metadata.version("pytorch-optimizer")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if tuple(int(part) for part in found.split(".")[:2] if part.isdigit()) < VERSION:
        raise ValueError(
            "SOLVER.OPTIMIZER: 'MUON' is in the package pytorch-optimizer from 4.1 on, "
            f"{f'and here is {found}' if found else 'which is not installed'}: "
            "pip install 'pytorch-optimizer>=4.1'."
        )
    from pytorch_optimizer import Muon

    if lr >= SGDS_LR:
        logger.warning(
            f"SOLVER.BASE_LR (optimizer.lr): found {lr:g}, which is SGD's size. Muon's learning "
            "rate is AdamW's, such as 0.0001 to 0.004, and 0.01 broke training down in our runs."
        )
    if not all(isinstance(group, dict) and "use_muon" in group for group in params):
        raise ValueError(
            "build_muon: params: a group does not say whether it is Muon's. Make them by "
            "agvm_d2.solver.muon_params(model), in a LazyConfig "
            "optimizer.params=L(muon_params)()."
        )
    return loading_as_torch(Muon)(
        params,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        use_adjusted_lr=True,
        adamw_lr=lr,
        adamw_betas=tuple(betas),
        adamw_eps=eps,
        adamw_wd=weight_decay,
    )
