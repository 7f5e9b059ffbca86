"""Tensors of which each worker holds a shard, as FSDP2 (`fully_shard`) makes them: what they are,
and how states of them are made whole and cut again."""

from __future__ import annotations
import copy
from collections.abc import Iterable
from typing import Any
import torch
import torch.distributed as dist
from torch import nn

from .modules import named_parameters, uncompiled

Sharded = Any  # a DTensor, which not every torch has, of fully_shard


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules on which `fully_shard` was called, from the outermost on."""
    return [m for m in model.modules() if "FSDPModule" in {c.__name__ for c in type(m).__mro__}]


def is_sharded(model: nn.Module) -> bool:
    """Has it parts under `fully_shard`, other DTensors, or FSDP1's flat parameters?"""
    flat = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    sharded = any(hasattr(p, "to_local") for p in model.parameters())
    return flat or sharded or bool(fsdp_modules(model))


def _divide_factor(unit: Any) -> float | None:
    """What `set_gradient_divide_factor` has set; None also where this torch does not tell."""
    try:
        state = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        return next(g.gradient_divide_factor for g in groups if g is not None)
    except (AttributeError, StopIteration):
        return None


def reshard(model: nn.Module) -> None:
    """Let the model hold its shards. After a forward pass without a backward one, as in an
    evaluation, the outermost unit still holds whole parameters."""
    for unit in fsdp_modules(model):
        unit.reshard()


def check_sharding(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """See that a model is sharded as `ShardedTap` takes it, and an optimizer over its shards.

    Raises:
        ValueError: by something else than FSDP2, on a mesh without all workers, in part, or after
            the optimizer was built.
    """
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError(
            "AGVM cannot measure FullyShardedDataParallel (FSDP1), which flattens the parameters "
            "of several modules into one. Shard the model with FSDP2, "
            "torch.distributed.fsdp.fully_shard."
        )
    if not fsdp_modules(model):
        raise ValueError(
            "AGVM: the model's parameters are DTensors, but not by fully_shard. Tensor parallelism "
            "alone gives no gradients to compare: use FSDP2, or train with AGVM.ENABLED False."
        )
    if fsdp_modules(model)[0] is not uncompiled(model):
        raise ValueError(
            f"AGVM: parts of the model are sharded, but not {type(uncompiled(model)).__name__} "
            "itself: call fully_shard on it last, after its parts."
        )
    world = dist.get_world_size() if dist.is_initialized() else 1
    for unit in fsdp_modules(model):
        factor = _divide_factor(unit)
        if factor is not None and factor != world:
            raise ValueError(
                f"AGVM: set_gradient_divide_factor({factor:g}) makes the gradient another one than "
                f"the mean over the {world} workers, with which single gradients are compared. "
                "Leave it out, and scale the loss instead."
            )
    trainable: list[tuple[str, Any]] = [
        (name, p) for name, p in named_parameters(model) if p.requires_grad
    ]
    for name, param in trainable:
        if not hasattr(param, "to_local"):
            raise ValueError(
                f"AGVM: '{name}' is not sharded, so nobody averages its gradient: take it out of "
                "fully_shard's ignored_params, or freeze it."
            )
        *others, last = param.placements
        if not last.is_shard() or not all(p.is_replicate() for p in others):
            raise ValueError(
                f"AGVM: '{name}' is placed as {tuple(param.placements)}, as by tensor parallelism "
                "beside FSDP2. AGVM takes fully_shard over a mesh of one dimension (FSDP), or of "
                "two, replicas and shards (HSDP)."
            )
        if param.device_mesh.size() != world:
            raise ValueError(
                f"AGVM: '{name}' is sharded over a mesh of {param.device_mesh.size()} workers, but "
                f"there are {world}: give fully_shard a mesh of all, such as "
                "init_device_mesh(device, (replicas, shards))."
            )
        first, shards = trainable[0][0], trainable[0][1].device_mesh.size(-1)
        if param.device_mesh.size(-1) != shards:
            raise ValueError(
                f"AGVM: '{first}' is cut into {shards} shards, but '{name}' into "
                f"{param.device_mesh.size(-1)}: give all calls of fully_shard one mesh."
            )
    for i, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        if any(p.requires_grad and not hasattr(p, "to_local") for p in group["params"]):
            raise ValueError(
                f"Group {i} of the optimizer holds whole parameters, which no longer belong to the "
                "model: fully_shard has replaced them. Build the optimizer after fully_shard."
            )


def whole_parameters(model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Shard -> the whole parameter that forward and backward use, which FSDP2 keeps for the life
    of the model and fills in turn. Each unit is gathered once, so all workers call this."""
    found: dict[nn.Parameter, nn.Parameter] = {}
    for unit in fsdp_modules(model):
        shards = dict(unit.named_parameters())
        unit.unshard()
        for name, param in unit.named_parameters():
            if not hasattr(param, "to_local"):  # of this unit, not of one inside it
                found[shards[name]] = param
        unit.reshard()
    return found


def _shape_of_shard(param: Sharded, rank: int) -> torch.Size:
    """As torch.chunk cuts it; the last ranks may have nothing."""
    dim = param.placements[-1].dim
    shards = param.device_mesh.size(-1)
    size = -(-param.shape[dim] // shards)
    rows = max(0, min(size, param.shape[dim] - rank * size))
    return torch.Size([*param.shape[:dim], rows, *param.shape[dim + 1 :]])


def shard_of(whole: torch.Tensor, param: Sharded) -> torch.Tensor:
    """This worker's part of a whole tensor of the shape of a sharded parameter; a view."""
    dim = param.placements[-1].dim
    rank = param.device_mesh.get_local_rank(-1)
    start = min(rank * _shape_of_shard(param, 0)[dim], whole.shape[dim])
    return whole.narrow(dim, start, _shape_of_shard(param, rank)[dim])


def shard_like(whole: Any, param: Any) -> Any:
    """A whole tensor, which all workers have, as a DTensor that is sharded as `param` is, without
    traffic; anything else as it is."""
    fits = isinstance(whole, torch.Tensor) and hasattr(param, "to_local")
    if not fits or hasattr(whole, "to_local") or whole.shape != param.shape:
        return whole
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard_of(whole, param).to(local_part(param).device, copy=True),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def whole_state(state: Any, keep: bool) -> Any:
    """A state_dict with each DTensor made whole on the CPU; all workers call this.

    Args:
        keep: return it, as who writes it does; else None in the place of each.
    """
    if hasattr(state, "to_local"):
        whole = state.to(state.device_mesh.device_type).full_tensor()  # the CPU's are not gathered
        return whole.cpu() if keep else None
    if isinstance(state, dict):
        whole = copy.copy(state)  # with the versions that a model's has in `_metadata`
        whole.update((key, whole_state(value, keep)) for key, value in state.items())
        return whole
    if isinstance(state, (list, tuple)):
        values = [whole_state(value, keep) for value in state]
        return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)
    return state


def shard_loaded(model: nn.Module, state: dict, *_: Any) -> None:
    """A pre-hook of `load_state_dict`: shards of the whole tensors in `state`."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name in state:
            state[name] = shard_like(state[name], tensor)


@torch.no_grad()
def gathered(
    params: Iterable[Sharded], shards: Iterable[torch.Tensor]
) -> dict[Sharded, torch.Tensor]:
    """Parameter -> a whole tensor of its shape, of which each worker gives its shard; float32, in
    one all-gather."""
    params = list(params)
    if not params:
        return {}
    mesh = params[0].device_mesh
    ranks = mesh.size(-1)
    room = [_shape_of_shard(p, 0).numel() for p in params]  # the first shard is the largest
    mine = torch.zeros(sum(room), device=mesh.device_type)  # shards may be offloaded to the CPU
    for piece, shard in zip(mine.split(room), shards, strict=True):
        piece[: shard.numel()].copy_(shard.reshape(-1))
    out = torch.empty(ranks, len(mine), device=mine.device)
    dist.all_gather([*out], mine, group=mesh.get_group(mesh.ndim - 1))
    found = {}
    for param, pieces in zip(params, out.split(room, dim=1), strict=True):
        shapes = [_shape_of_shard(param, rank) for rank in range(ranks)]
        parts = [row[: s.numel()].view(s) for row, s in zip(pieces, shapes, strict=True)]
        found[param] = torch.cat(parts, param.placements[-1].dim)
    return found
