"""Param groups of one module each, and saved optimizer states that fit them."""

from __future__ import annotations
import re
from collections.abc import Callable
from typing import Any
import torch
from torch import nn

from .modules import ModulePatterns, assign_modules, named_parameters, patterns_for
from .shards import shard_like

# By which optimizers can be told apart, and none that only some versions of torch have.
HYPERPARAMETERS = ("momentum", "betas", "trust_coefficient", "grad_averaging", "use_muon")

OLD_COMPILE = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 3)


def require_hooks(optimizer: torch.optim.Optimizer) -> None:
    """See that `optimizer` has torch's hooks.

    Raises:
        TypeError: a wrapper that does not call Optimizer.__init__, and so has none.
    """
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
        optimizer.register_load_state_dict_pre_hook(lambda *_: None).remove()
    except AttributeError:
        raise TypeError(
            f"The optimizer {type(optimizer).__name__} has no hooks of its own: a wrapper which "
            "does not call Optimizer.__init__. Give agvm_d2 the one inside it, then wrap that."
        ) from None


def require_called_hooks(optimizer: torch.optim.Optimizer) -> None:
    """See that `step` calls them: in torch 2.1 and 2.2 a first call of torch.compile, of any model,
    puts the bare `step` back into all of torch's optimizers.

    Raises:
        RuntimeError: it does not.
    """
    step = type(optimizer).step
    code = getattr(step, "__code__", None)
    if OLD_COMPILE and getattr(step, "hooked", False) and code and code.co_name != "wrapper":
        raise RuntimeError(
            f"torch.compile of torch {torch.__version__} has taken the hooks of "
            f"{type(optimizer).__name__}.step away, by which AGVM and clipping work. Use torch 2.3 "
            "or newer, or leave torch.compile out."
        )


def is_zero(optimizer: torch.optim.Optimizer) -> bool:
    """Is it torch's ZeroRedundancyOptimizer, of which each worker steps some of the parameters?"""
    return "ZeroRedundancyOptimizer" in {c.__name__ for c in type(optimizer).__mro__}


def split_param_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, modules: ModulePatterns = ()
) -> torch.optim.Optimizer:
    """Split each group of a freshly built optimizer by module, in place, keeping every other key.
    A state saved before or without that still loads.

    >>> model = nn.ModuleDict({"backbone": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> tuple(len(g["params"]) for g in split_param_groups(optimizer, model).param_groups)
    (2, 2)

    Args:
        optimizer: any optimizer over parameters of `model`, before its LR scheduler is built.
        model: the model, also inside DistributedDataParallel.
        modules: patterns as for `assign_modules`.

    Returns:
        The same optimizer.

    Raises:
        TypeError: a wrapper without hooks.
        ValueError: a scheduler is built already; a parameter that is not in the model; a
            ZeroRedundancyOptimizer with a group of several modules; see also `assign_modules`.
    """
    require_hooks(optimizer)
    if is_zero(optimizer):  # its inner optimizer would keep the old groups, and their rates
        _check_zero(optimizer, assign_modules(model, modules))
        return optimizer
    fit_loaded_state(optimizer)
    assign_modules(model, modules)  # its errors
    patterns = modules or patterns_for(model)
    # Frozen ones too, which may be unfrozen while training.
    owner = {
        p: next((module for module, regex in patterns if re.match(regex, name)), "")
        for name, p in named_parameters(model)
    }
    groups: list[dict[str, Any]] = []
    for i, group in enumerate(optimizer.param_groups):
        if "initial_lr" in group:
            raise ValueError(
                "split_param_groups: the optimizer has an LR scheduler already, which would keep "
                "the old groups' learning rates. Split first, then build the scheduler."
            )
        parts: dict[str, list[int]] = {}
        for k, param in enumerate(group["params"]):
            if param not in owner:
                raise ValueError(
                    f"split_param_groups: group {i} of the optimizer holds a parameter of shape "
                    f"{tuple(param.shape)} that is not in the model. (fully_shard and .to() may "
                    "have replaced it: build the optimizer after them.)"
                )
            parts.setdefault(owner[param], []).append(k)
        aligned = [k for k in ("params", "param_names") if k in group]
        for indices in parts.values():
            groups.append({**group, **{key: [group[key][k] for k in indices] for key in aligned}})
    optimizer.param_groups[:] = groups
    return optimizer


def _check_zero(optimizer: torch.optim.Optimizer, modules: dict[str, list[nn.Parameter]]) -> None:
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps inside DDP's communication hook, "
            "where no learning rate can be scaled: set it to False."
        )
    try:
        module_of_groups(optimizer, modules)
    except ValueError as error:
        raise ValueError(
            f"{str(error).split('. Call')[0]}. A ZeroRedundancyOptimizer cannot be split once it "
            'is built: build it over [{"params": params} for params in '
            "agvm_d2.modules.assign_modules(model).values()]."
        ) from None


def stepped_by(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    """All its parameters."""
    return {p for group in optimizer.param_groups for p in group["params"]}


def stepped_modules(
    model: nn.Module, optimizer: torch.optim.Optimizer, patterns: ModulePatterns = ()
) -> dict[str, list[nn.Parameter]]:
    """`assign_modules` without what is not this optimizer's, which does not clear its gradients:
    they may be sums over iterations.

    Raises:
        ValueError: none of the model's parameters are; see also `assign_modules`.
    """
    stepped = stepped_by(optimizer)
    modules = {
        name: [p for p in params if p in stepped]
        for name, params in assign_modules(model, patterns).items()
    }
    if not any(modules.values()):
        raise ValueError(
            "The optimizer has none of the model's trainable parameters. (fully_shard and .to() "
            "may have replaced them: build the optimizer after them.)"
        )
    return {name: params for name, params in modules.items() if params}


def module_of_groups(
    optimizer: torch.optim.Optimizer, modules: dict[str, list[nn.Parameter]]
) -> list[int]:
    """The index of each param group's module; -1 for a group of frozen parameters.

    Raises:
        ValueError: a group of several modules.
    """
    names = list(modules)
    owner = {p: i for i, params in enumerate(modules.values()) for p in params}
    matched = []
    for i, group in enumerate(optimizer.param_groups):
        found = sorted({owner[p] for p in group["params"] if p in owner})
        if len(found) > 1:
            raise ValueError(
                f"Group {i} of the optimizer mixes the modules {', '.join(names[k] for k in found)}"
                ", so they cannot have learning rates of their own. Call "
                "split_param_groups(optimizer, model) before the LR scheduler is built."
            )
        matched.append(found[0] if found else -1)
    return matched


def fit_loaded_state(optimizer: torch.optim.Optimizer) -> None:
    """From now on `load_state_dict` takes states saved with the groups as they are now, also after
    `split_param_groups`, and refuses others clearly."""
    whole = [list(group["params"]) for group in optimizer.param_groups]
    optimizer.register_load_state_dict_pre_hook(
        lambda optimizer, state: _shard_state(optimizer, _fit_state(optimizer, state, whole))
    )


def loading_as_torch(optimizer: type) -> Callable[..., torch.optim.Optimizer]:
    """A class of pytorch-optimizer whose `load_state_dict` is torch's. Its own goes through the
    saved groups once more, as they were before a hook has fitted them to those of now."""
    load = torch.optim.Optimizer.load_state_dict
    own = {"load_state_dict": load, "__module__": optimizer.__module__}
    return type(optimizer.__name__, (optimizer,), own)


def _shard_state(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """A state of whole tensors for parameters that are sharded; any other as it is."""
    param_of = {
        index: param
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
        for param, index in zip(group["params"], saved["params"], strict=True)
    }
    if not any(hasattr(param, "to_local") for param in param_of.values()):
        return state
    states = {
        index: {key: shard_like(value, param_of[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": states}


def _fit_state(
    optimizer: torch.optim.Optimizer, state: dict, whole: list[list[nn.Parameter]]
) -> dict:
    """A saved optimizer state for the groups of `optimizer`, also where it was saved without AGVM.

    Args:
        whole: the groups before they were split.

    Raises:
        ValueError: a state of other groups, or of another optimizer.
    """
    groups, saved = optimizer.param_groups, state["param_groups"]
    keys = [  # of any group: Muon's are of two kinds
        {key for key in HYPERPARAMETERS if any(key in group for group in some)}
        for some in (groups, saved)
    ]
    if keys[0] != keys[1]:
        raise ValueError(
            f"The checkpoint is of another optimizer than {type(optimizer).__name__}: it has "
            f"{', '.join(sorted(keys[1]))} instead of {', '.join(sorted(keys[0]))}. Resume with "
            "the SOLVER.OPTIMIZER (optimizer) it was trained with, or start from its weights: "
            "MODEL.WEIGHTS (train.init_checkpoint), without --resume."
        )
    sizes = [len(group["params"]) for group in saved]
    if sizes == [len(group["params"]) for group in groups]:
        return state
    if sizes != [len(params) for params in whole]:
        raise ValueError(
            f"The checkpoint's optimizer has {len(saved)} param groups of {sizes} parameters; this "
            f"one has {len(groups)}. With other AGVM.MODULES, or AGVM.ENABLED False after True, "
            'keep them as they were and set AGVM.MODE "monitor" to train without the factors; or '
            "start from its weights: MODEL.WEIGHTS, without --resume."
        )
    # Saved without AGVM: the same parameters in the same groups, not yet split.
    return regroup(state, whole, [group["params"] for group in groups])


def regroup(state: dict, saved: list[list[Any]], now: list[list[Any]]) -> dict:
    """An optimizer's saved state in other groups of the same parameters, each with the options of
    the group that its first parameter was in.

    Args:
        saved, now: the parameters of each group, or their names.
    """
    group_of: dict[Any, dict] = {}
    index: dict[Any, int] = {}
    for params, group in zip(saved, state["param_groups"], strict=True):
        group_of.update(dict.fromkeys(params, group))
        index.update(zip(params, group["params"], strict=True))
    groups = [{**group_of[params[0]], "params": [index[p] for p in params]} for params in now]
    return {**state, "param_groups": groups}
