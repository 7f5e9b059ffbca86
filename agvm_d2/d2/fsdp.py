"""A LazyConfig's `train.fsdp`: FSDP2 in the place of DistributedDataParallel."""

from __future__ import annotations
import contextlib
import functools
import random
from collections.abc import Iterator, Mapping
from typing import Any
import numpy as np
import torch
import torch.distributed.fsdp
from detectron2.utils import comm
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from ..validate import is_int, one_of, require
from .agreement import check_agreement, weights

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
DEFAULTS = {
    "replicas": 1,  # HSDP: as many copies of the model, each sharded over workers / replicas
    "unit_size": 1_000_000,  # parameters of the smallest part that is gathered by itself
    "reshard_after_forward": True,  # False: parts stay gathered until the backward pass
    "checkpoint_activations": False,  # each unit computes its activations again in the backward
    "precision": "float32",  # or bfloat16, of gathered parameters and autocast; sums stay float32
}


def check_fsdp(options: Any, num_workers: int, amp: bool) -> None:
    """See that `train.fsdp` can be used with `num_workers` workers.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise ValueError(f"train.fsdp: found {options!r}, but it must be a dict, or None (off).")
    for name in options:
        one_of("train.fsdp", name, tuple(DEFAULTS))
    values = {**DEFAULTS, **options}
    for name in ("replicas", "unit_size"):
        require(
            is_int(values[name]) and values[name] > 0,
            f"train.fsdp.{name}",
            values[name],
            "be a positive whole number",
        )
    for name in ("reshard_after_forward", "checkpoint_activations"):
        require(
            isinstance(values[name], bool), f"train.fsdp.{name}", values[name], "be True or False"
        )
    one_of("train.fsdp.precision", values["precision"], tuple(PRECISIONS))
    if num_workers == 1:
        raise ValueError(
            "train.fsdp: there is one worker, and nobody to share the model with. Start more "
            "(--num-gpus 2, or several machines), or set train.fsdp=null."
        )
    require(
        num_workers % values["replicas"] == 0 and num_workers > values["replicas"],
        "train.fsdp.replicas",
        values["replicas"],
        f"divide the number of workers, {num_workers}, and be below it",
    )
    if amp:
        raise ValueError(
            "train.amp.enabled: found True, but with train.fsdp it must be False: float16 needs a "
            "loss scale, which FSDP2's shards do not share. Set train.fsdp.precision=bfloat16."
        )
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        raise ValueError(f"train.fsdp needs torch 2.6 or newer; this is {torch.__version__}.")


def precision(options: Mapping[str, Any] | None) -> torch.dtype | None:
    """Of autocast, which goes with `train.fsdp`; None: off."""
    return PRECISIONS[{**DEFAULTS, **(options or {})}["precision"]]


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """What draws random numbers in here draws the main worker's, whose weights DDP would take."""
    own = torch.get_rng_state(), np.random.get_state(), random.getstate()
    _set_random_state(*comm.all_gather(own)[0])
    try:
        yield
    finally:
        if not comm.is_main_process():
            _set_random_state(*own)


def _set_random_state(of_torch: torch.Tensor, of_numpy: Any, of_python: Any) -> None:
    torch.set_rng_state(of_torch)
    np.random.set_state(of_numpy)
    random.setstate(of_python)


def parts_to_shard(model: nn.Module, unit_size: int) -> list[nn.Module]:
    """Parts of the model, the innermost first, that FSDP2 gathers one at a time: blocks, which a
    ModuleList or Sequential holds, of `unit_size` parameters beside those of units inside them."""
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> int:
        """Parameters that no unit has yet."""
        if module in seen:  # used in two places
            return 0
        seen.add(module)
        rest = sum(p.numel() for p in module.parameters(recurse=False))
        for child in module.children():
            inside = visit(child)
            block = isinstance(module, (nn.ModuleList, nn.Sequential))
            if block and inside >= unit_size and not isinstance(child, nn.ModuleList):
                found.append(child)
                inside = 0
            rest += inside
        return rest

    visit(model)
    return found


def shard(model: nn.Module, device: str, options: Mapping[str, Any]) -> nn.Module:
    """`model`, the same on all workers, sharded in place.

    Args:
        device: on which it trains; the model itself may be on the CPU, whole.
        options: `train.fsdp`, see `DEFAULTS`.

    Raises:
        ValueError: the workers' weights differ; a BatchNorm is to compute its activations again.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    values = {**DEFAULTS, **options}
    check_agreement({"weights at the start": weights(model)})
    replicas = values["replicas"]
    sizes = (replicas, comm.get_world_size() // replicas)[replicas == 1 :]
    names = ("replicas", "shards")[replicas == 1 :]
    mesh = init_device_mesh(torch.device(device).type, sizes, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(PRECISIONS[values["precision"]], reduce_dtype=torch.float32)
    parts = parts_to_shard(model, values["unit_size"])
    if values["checkpoint_activations"]:
        _check_checkpointed(parts)
    for unit in parts:
        if values["checkpoint_activations"]:
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
        fully_shard(
            unit, mesh=mesh, reshard_after_forward=values["reshard_after_forward"], mp_policy=policy
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _check_checkpointed(parts: list[nn.Module]) -> None:
    norms = nn.modules.batchnorm._BatchNorm
    if any(isinstance(module, norms) for part in parts for module in part.modules()):
        raise ValueError(
            "train.fsdp.checkpoint_activations: found True, but the model has BatchNorm, whose "
            "statistics would be updated twice per iteration. Set it to False, or use FrozenBN, "
            "LayerNorm or GroupNorm."
        )


class EvenLoader:
    """A test loader with as many forward passes for each worker, since the parts of a sharded model
    are gathered by all of them together: who has fewer images repeats its last, for nothing."""

    def __init__(self, loader: DataLoader, model: nn.Module):
        self._loader, self._model = loader, model
        sizes = comm.all_gather(len(loader))
        self._more = max(sizes) - len(loader)
        self._any = None  # an image for who has none
        if not min(sizes):
            some = comm.all_gather(next(iter(loader), None))
            self._any = next(inputs for inputs in some if inputs is not None)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        inputs = self._any
        for inputs in self._loader:
            yield inputs
        for _ in range(self._more):
            self._model(inputs)
