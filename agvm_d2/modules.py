"""Which module each parameter belongs to: ordered patterns, the first match wins."""

from __future__ import annotations
import re
from collections.abc import Sequence
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ModulePatterns = Sequence[tuple[str, str]]

# (module, regex matched at the start of the parameter's name). Detectron2 keeps the FPN inside
# `model.backbone`; C4 models keep res5 of the backbone inside `roi_heads`.
DEFAULT_PATTERNS: ModulePatterns = (
    ("backbone", r"backbone\.(?!fpn[_.]|top_block\.|simfp_)|roi_heads\.res5\."),
    ("fpn", r"backbone\."),
    ("rpn", r"(proposal_generator|rpn)\."),  # torchvision calls it rpn
    ("mask_head", r"roi_heads\.mask_"),
    ("keypoint_head", r"roi_heads\.keypoint_"),
    ("box_head", r"roi_heads\."),
    ("sem_seg_head", r"sem_seg_head\."),
    ("head", r"head\."),
    ("rest", r""),
)


# What torch.compile, activation checkpointing and FSDP put into the names of parameters.
WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, else the model itself."""
    return getattr(model, "_orig_mod", model)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile, else the model itself."""
    model = uncompiled(model)
    return uncompiled(model.module) if isinstance(model, DistributedDataParallel) else model


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters, by their names in the model without wrappers."""
    return [(WRAPPERS.sub("", name), p) for name, p in unwrap(model).named_parameters()]


def children_patterns(names: Sequence[str]) -> ModulePatterns:
    """One module per child of the model, going down while there is only one; names are parameters'.

    For `detr.backbone.0.weight`, `detr.head.weight`: backbone and head. A parameter of the model
    itself is in "rest".
    """
    prefix = ""
    while True:
        children = dict.fromkeys(n[len(prefix) :].split(".")[0] for n in names)
        nested = [n for n in names if "." in n[len(prefix) :]]
        if len(children) > 1 or len(nested) < len(names) or not names:
            break
        prefix += next(iter(children)) + "."
    parents = dict.fromkeys(n[len(prefix) :].split(".")[0] for n in nested)
    return [(child, re.escape(f"{prefix}{child}.")) for child in parents] + [("rest", "")]


def patterns_for(model: nn.Module) -> ModulePatterns:
    """`DEFAULT_PATTERNS`, or, where none of those but the last fits, `children_patterns`."""
    names = [n for n, p in named_parameters(model) if p.requires_grad]
    known = any(re.match(regex, name) for _, regex in DEFAULT_PATTERNS[:-1] for name in names)
    return DEFAULT_PATTERNS if known else children_patterns(names)


def assign_modules(
    model: nn.Module, patterns: ModulePatterns = ()
) -> dict[str, list[nn.Parameter]]:
    """Assign every trainable parameter of `model` to exactly one module.

    Args:
        model: a model, also inside DistributedDataParallel, torch.compile or activation
            checkpointing. Frozen parameters are skipped; a shared one counts by its first name.
        patterns: pairs (module name, regex); a regex is matched at the start of a parameter's name
            and the first match wins. Two pairs may name the same module. Empty: `patterns_for`.

    Returns:
        module name -> its parameters, in the order of the patterns, without empty modules.

    Raises:
        ValueError: a parameter that no pattern matches, or a given pattern that matches none.
    """
    given = bool(patterns)
    patterns = patterns or patterns_for(model)
    trainable = [(n, p) for n, p in named_parameters(model) if p.requires_grad]
    found: list[list[nn.Parameter]] = [[] for _ in patterns]
    for param_name, param in trainable:
        for params, (_, regex) in zip(found, patterns, strict=True):
            if re.match(regex, param_name):
                params.append(param)
                break
        else:
            raise ValueError(
                f"AGVM.MODULES: no pattern matches the trainable parameter '{param_name}'. "
                'Add a pair for it, or end with the catch-all ("rest", "").'
            )
    modules: dict[str, list[nn.Parameter]] = {}
    for params, (name, regex) in zip(found, patterns, strict=True):
        if params:
            modules.setdefault(name, []).extend(params)
        elif given:
            raise ValueError(
                f'AGVM.MODULES: the pair ("{name}", "{regex}") matches no trainable parameter '
                "that an earlier pair has not taken. Correct the regex, its place, or remove it."
            )
    if not modules:
        raise ValueError("The model has no trainable parameter.")
    return modules
