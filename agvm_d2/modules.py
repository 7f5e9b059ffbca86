"""Which module each parameter belongs to: ordered patterns, the first match wins.

`python -m agvm_d2.modules --config-file CONFIG [KEY VALUE ...]` prints the modules of a config's
model without training it.
"""

from __future__ import annotations
import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ModulePatterns = Sequence[tuple[str, str]]

# (module, regex matched at the start of the parameter's name). Several lines may name one module.
DEFAULT_PATTERNS: ModulePatterns = (
    # Detectron2 keeps the FPN inside `model.backbone`, AdelaiDet and CenterNet2 the BiFPN, mmdet's
    # wrapper a neck. C4 models keep res5 of the backbone inside `roi_heads`.
    (
        "backbone",
        r"backbone\.(?!fpn[_.]|top_block\.|simfp_|repeated_bifpn\.|neck\.)|roi_heads\.res5\.",
    ),
    ("fpn", r"backbone\."),
    ("neck", r"(neck|input_proj)\."),  # DETRs' channel mapper, mmdet's FPN
    # Mask2Former, MaskFormer, OneFormer; mmdet calls their head panoptic_head, mmseg decode_head.
    ("pixel_decoder", r"(sem_seg|panoptic|decode)_head\.pixel_decoder\."),
    # The class, box and mask heads of queries, also where the decoder has them.
    ("head", r"sem_seg_head\.predictor\.(decoder\.)?_?(class|bbox|mask)_embed\."),
    ("head", r"(panoptic|decode)_head\.(cls|mask)_embed\."),
    ("head", r"(transformer\.(decoder\.)?)?(class|bbox)_embed\."),
    # DETRs, of detrex and of mmdet. Embeddings of levels and queries are with what reads them.
    ("encoder", r"transformer\.(encoder|level_embed|enc_mask_predictor|sampler|alpha)"),
    ("encoder", r"encoder\.|level_embed$"),
    ("decoder", r"transformer\.(decoder|enc_output|tgt_embed|reference_points|p(os|ix)_trans)"),
    ("decoder", r"transformer\.(pattern|position|adapt_pos)"),
    ("decoder", r"decoder\.|query_embed|tgt_embed|refpoint_embed|anchor_box_embed|label_enc\."),
    ("decoder", r"memory_trans_|reference_points_fc\.|(dn_query|denoising)_generator\."),
    # Elsewhere the `predictor` of a segmentation head is its last layer.
    ("decoder", r"sem_seg_head\.predictor\.(class_)?(transformer|decoder|input_proj|enc_output)"),
    ("decoder", r"sem_seg_head\.predictor\.(query_|level_embed|label_enc)|task_mlp\."),
    ("decoder", r"(panoptic|decode)_head\.(transformer_decoder|query_|level_embed)"),
    ("text_encoder", r"text_(encoder|projector)\.|prompt_ctx\.|criterion\.logit_scale"),
    ("rpn", r"(proposal_generator|rpn|rpn_head)\."),  # torchvision calls it rpn
    ("mask_head", r"roi_heads?\.mask_|mask_head\."),
    ("mask_head", r"(mask_branch|controller|basis_module|top_layer)\."),  # AdelaiDet
    ("keypoint_head", r"roi_heads?\.keypoint_"),
    ("box_head", r"roi_heads\.|roi_head\.(?!semantic_head\.)"),
    ("sem_seg_head", r"(sem_seg_head|decode_head|(roi_head\.)?semantic_head)\."),
    ("auxiliary_head", r"auxiliary_head\."),  # mmseg
    ("ins_embed_head", r"ins_embed_head\."),  # Panoptic-DeepLab
    ("head", r"(head|bbox_head|ins_head)\."),
    ("rest", r""),
)

# Where no ROI heads follow, as in AdelaiDet's FCOS and a CenterNet, unless it is Detectron2's RPN.
ONE_STAGE_HEAD = ("head", r"proposal_generator\.(?!rpn)")

# `DEFAULT_PATTERNS` are for models with one of these; an `encoder` alone may be anything's.
KNOWN = re.compile(r"(backbone|proposal_generator|rpn|roi_heads|sem_seg_head|head)\.")


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


def wrapper_of(trainable: Sequence[str], names: Sequence[str]) -> str:
    """What the names of all trainable parameters begin with, as far as it holds nothing but one
    child: "detr." for `detr.backbone.weight`, `detr.neck.weight`. Not beyond where a name, also a
    frozen parameter's, is `KNOWN`."""
    prefix = ""
    while trainable and not is_known(names, prefix):
        child = trainable[0][len(prefix) :].split(".")[0]
        if not all(n.startswith(f"{prefix}{child}.") for n in trainable):
            break
        prefix += child + "."
    return prefix


def is_known(names: Sequence[str], prefix: str) -> bool:
    return any(KNOWN.match(n[len(prefix) :]) for n in names if n.startswith(prefix))


def children_patterns(names: Sequence[str], prefix: str = "") -> ModulePatterns:
    """One module per child of what is at `prefix`; names are parameters'.

    For `backbone.0.weight`, `head.weight`: backbone and head. A parameter of the model itself is in
    "rest", and a child "model" is "model_", since that is what the log calls the whole.
    """
    inner = [n[len(prefix) :] for n in names]
    children = dict.fromkeys(n.split(".")[0] for n in inner if "." in n)
    named = {child: "model_" if child == "model" else child for child in children}
    return [(named[c], re.escape(f"{prefix}{c}.")) for c in children] + [("rest", "")]


def patterns_for(model: nn.Module) -> ModulePatterns:
    """`DEFAULT_PATTERNS`, or, where the architecture is not `KNOWN`, `children_patterns`.

    Both where what is known is frozen, or inside a wrapper, such as a student whose teacher is
    frozen: then what no default pattern fits is a module by its child's name.
    """
    names = [n for n, _ in named_parameters(model)]
    trainable = [n for n, p in named_parameters(model) if p.requires_grad]
    prefix = wrapper_of(trainable, names)
    if not is_known(names, prefix):
        return children_patterns(trainable, prefix)
    patterns = list(DEFAULT_PATTERNS)
    if not any(n.startswith(f"{prefix}roi_heads.") for n in names):
        patterns.insert([module for module, _ in patterns].index("rpn"), ONE_STAGE_HEAD)
    if not prefix and is_known(trainable, prefix):
        return patterns
    inside = [(module, f"{re.escape(prefix)}({regex})") for module, regex in patterns[:-1]]
    return [*inside, *children_patterns(trainable, prefix)]


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
    if any(name == "model" for name, _ in patterns):
        raise ValueError(
            'AGVM.MODULES: a module cannot be named "model", as the whole model is in the log.'
        )
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


def module_table(model: nn.Module, modules: dict[str, list[nn.Parameter]]) -> str:
    """Text, a line for each module: its parameters, their share of all in modules, and the names of
    the first and the last. `modules` are those of `model` by `assign_modules`."""
    name_of = {p: name for name, p in named_parameters(model)}
    sizes = {module: sum(p.numel() for p in params) for module, params in modules.items()}
    rows = [("module", "parameters", "%", "first parameter", "last parameter")]
    for module, params in modules.items():
        share = f"{100 * sizes[module] / sum(sizes.values()):.1f}"
        rows.append((module, f"{sizes[module]:,}", share, name_of[params[0]], name_of[params[-1]]))
    name, number, percent, first, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        f"{a:{name}}  {b:>{number}}  {c:>{percent}}  {d:{first}}  {e}" for a, b, c, d, e in rows
    )


# The package imports this file, about which `python -m` would warn.
warnings.filterwarnings("ignore", message="'agvm_d2.modules' found", category=RuntimeWarning)


def main(argv: list[str] | None = None) -> None:
    from .d2.imports import add_flag, add_unsafe_flag
    from .d2.skeleton import model_of

    parser = argparse.ArgumentParser(
        description="Print the modules of a config's model, without training it."
    )
    parser.add_argument("--config-file", required=True, help="a YAML config or a LazyConfig (.py)")
    add_flag(parser)
    add_unsafe_flag(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE, of a LazyConfig KEY=VALUE"
    )
    args = parser.parse_args(argv)
    try:
        model, patterns = model_of(
            args.config_file, args.opts, args.imports, args.allow_unsafe_yaml
        )
        modules = assign_modules(model, patterns)
    except (ValueError, OSError) as error:
        sys.exit(f"agvm_d2.modules: error: {error}")
    print(module_table(model, modules))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if frozen:
        print(f"({sum(p.numel() for p in frozen):,} parameters are frozen and in no module)")


if __name__ == "__main__":
    main()
