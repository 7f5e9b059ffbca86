"""A model with the parameter names of Mask2Former (facebookresearch/Mask2Former), which is not
installed: R-50, six layers of deformable attention in the pixel decoder, nine of the transformer
decoder. Each parameter is one number."""

from __future__ import annotations
import torch
from torch import nn

BOTH = ("weight", "bias")


def _of(module: str, *leaves: str) -> list[str]:
    return [f"{module}.{leaf}" for leaf in leaves]


def _backbone() -> list[str]:
    blocks = [f"res{s}.{b}" for s, n in ((2, 3), (3, 4), (4, 6), (5, 3)) for b in range(n)]
    convs = [f"{block}.conv{i}" for block in blocks for i in (1, 2, 3)]
    convs += ["stem.conv1", *(f"res{s}.0.shortcut" for s in (2, 3, 4, 5))]
    return [f"backbone.{conv}.weight" for conv in convs]  # FrozenBN has no parameters


def _pixel_decoder() -> list[str]:
    names = [
        "transformer.level_embed",
        *_of("mask_features", *BOTH),
        *(n for k in range(3) for i in (0, 1) for n in _of(f"input_proj.{k}.{i}", *BOTH)),
        *(
            n
            for c in ("adapter_1", "layer_1")
            for n in _of(c, "weight", "norm.weight", "norm.bias")
        ),
    ]
    attention = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    parts = [f"self_attn.{a}" for a in attention] + ["norm1", "linear1", "linear2", "norm2"]
    for layer in range(6):
        for part in parts:
            names += _of(f"transformer.encoder.layers.{layer}.{part}", *BOTH)
    return _of("sem_seg_head.pixel_decoder", *names)


def _transformer_decoder() -> list[str]:
    names = (
        _of("query_feat", "weight") + _of("query_embed", "weight") + _of("level_embed", "weight")
    )
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    for i in range(9):
        for kind, name in (("self", "self_attn"), ("cross", "multihead_attn")):
            layer = f"transformer_{kind}_attention_layers.{i}"
            names += _of(f"{layer}.{name}", *attention) + _of(f"{layer}.norm", *BOTH)
        for part in ("linear1", "linear2", "norm"):
            names += _of(f"transformer_ffn_layers.{i}.{part}", *BOTH)
    return _of("sem_seg_head.predictor", *names, *_of("decoder_norm", *BOTH))


def _heads() -> list[str]:
    parts = ["class_embed", *(f"mask_embed.layers.{i}" for i in range(3))]
    return [n for part in parts for n in _of(f"sem_seg_head.predictor.{part}", *BOTH)]


# Module -> the names of its parameters.
NAMES = {
    "backbone": _backbone(),
    "pixel_decoder": _pixel_decoder(),
    "decoder": _transformer_decoder(),
    "head": _heads(),
}


class Named(nn.Module):
    """One number of each name; its losses draw them to the images' means."""

    def __init__(self) -> None:
        super().__init__()
        for name in (name for names in NAMES.values() for name in names):
            module: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(torch.zeros(1)))

    def forward(self, data: list[dict]) -> dict[str, torch.Tensor]:
        target = torch.stack([d["image"].float().mean() / 255 for d in data]).mean()
        return {"loss_all": sum((p - target).square().sum() for p in self.parameters())}
