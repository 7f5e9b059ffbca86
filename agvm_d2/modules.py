"""Which module each parameter belongs to: ordered rules, the first match wins."""

from __future__ import annotations
import re
from collections.abc import Sequence
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Rules = Sequence[tuple[str, str]]

# (module, regex matched at the start of the parameter's name). Detectron2 keeps the FPN inside
# `model.backbone`; C4 models keep res5 of the backbone inside `roi_heads`.
DEFAULT_RULES: Rules = (
    ("backbone", r"backbone\.(?!fpn_|top_block\.|simfp_)|roi_heads\.res5\."),
    ("fpn", r"backbone\."),
    ("rpn", r"proposal_generator\."),
    ("mask_head", r"roi_heads\.mask_"),
    ("keypoint_head", r"roi_heads\.keypoint_"),
    ("box_head", r"roi_heads\."),
    ("sem_seg_head", r"sem_seg_head\."),
    ("head", r"head\."),
    ("rest", r""),
)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, else the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def assign_modules(model: nn.Module, rules: Rules = ()) -> dict[str, list[nn.Parameter]]:
    """Assign every trainable parameter of `model` to exactly one module.

    Args:
        model: a model, also inside DistributedDataParallel. Frozen parameters are skipped; a shared
            parameter counts once, under its first name.
        rules: pairs (module name, regex); a regex is matched at the start of a parameter's name and
            the first match wins. Two pairs may name the same module. Empty: `DEFAULT_RULES`.

    Returns:
        module name -> its parameters, in the order of the rules, without empty modules.

    Raises:
        ValueError: a parameter that no rule matches, or a given rule that matches none.
    """
    given, rules = bool(rules), rules or DEFAULT_RULES
    patterns = [(name, re.compile(regex)) for name, regex in rules]
    found: list[list[nn.Parameter]] = [[] for _ in patterns]
    for param_name, param in unwrap(model).named_parameters():
        if not param.requires_grad:
            continue
        for params, (_, pattern) in zip(found, patterns, strict=True):
            if pattern.match(param_name):
                params.append(param)
                break
        else:
            raise ValueError(
                f"AGVM.MODULES: no rule matches the trainable parameter '{param_name}'. "
                'Add a pair for it, or end with the catch-all ("rest", "").'
            )
    modules: dict[str, list[nn.Parameter]] = {}
    for params, (name, regex) in zip(found, rules, strict=True):
        if params:
            modules.setdefault(name, []).extend(params)
        elif given:
            raise ValueError(
                f'AGVM.MODULES: the rule ("{name}", "{regex}") matches no trainable parameter that '
                "an earlier rule has not taken. Correct the regex, its place, or remove it."
            )
    if not modules:
        raise ValueError("The model has no trainable parameter.")
    return modules
