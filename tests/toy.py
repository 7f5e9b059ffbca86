"""A toy detector: Detectron2's calling convention and module names, a few hundred parameters.
Without Detectron2; `toy_d2` trains it there."""

from __future__ import annotations
import reference
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agvm_d2.modules import assign_modules

MODULES = ("backbone", "fpn", "rpn", "box_head")
IMAGE = 6


class ToyDetector(nn.Module):
    """list[dict(image, target)] -> dict of losses, each a mean over images."""

    def __init__(self, width: int = 8, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Module()
        self.backbone.bottom_up = nn.Sequential(
            nn.Linear(IMAGE, width), nn.Tanh(), nn.Linear(width, width)
        )
        self.backbone.fpn_lateral2 = nn.Linear(width, width)
        self.proposal_generator = nn.Linear(width, 1)
        self.roi_heads = nn.Module()
        self.roi_heads.box_head = nn.Linear(width, 1)

    def forward(self, data):
        x = torch.stack([d["image"] for d in data]).to(self.proposal_generator.weight.device)
        target = torch.stack([d["target"] for d in data]).to(x.device)
        features = torch.tanh(self.backbone.fpn_lateral2(torch.tanh(self.backbone.bottom_up(x))))
        return {
            "loss_rpn": (self.proposal_generator(features) - target).square().mean(),
            "loss_box": (self.roi_heads.box_head(features) + target).abs().mean(),
        }


def batch(size: int, seed: int = 0, scale: float = 1.0) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "image": scale * torch.randn(IMAGE, generator=g),
            "target": torch.randn(1, generator=g),
        }
        for _ in range(size)
    ]


def loss(model, data) -> torch.Tensor:
    return sum(model(data).values())


def parameter_names(model) -> dict[str, list[str]]:
    """Module -> its parameters' names, written by hand for ToyDetector."""
    prefixes = {
        "backbone": "backbone.bottom_up",
        "fpn": "backbone.fpn_lateral2",
        "rpn": "proposal_generator",
        "box_head": "roi_heads.box_head",
    }
    names = [n for n, _ in model.named_parameters()]
    return {m: [n for n in names if n.startswith(p)] for m, p in prefixes.items()}


def vectors(model, units, loss_of=loss) -> dict[str, list[torch.Tensor]]:
    """Module -> one gradient a unit, as a vector, by the reference."""
    gradients = reference.unit_gradients(model, loss_of, units)
    return {m: reference.flatten(gradients, n) for m, n in parameter_names(model).items()}


def factors(model, units, old=None, momentum=0.5, ratio_range=(0.5, 10.0), loss_of=loss) -> dict:
    """One update of each module's LR factor by the reference, from 1 or from `old`."""
    found = vectors(model, units, loss_of)
    variances = {m: reference.pairwise_variance(v) for m, v in found.items()}
    return reference.factors(
        old or dict.fromkeys(MODULES, 1.0), variances, "backbone", momentum, ratio_range
    )


def ddp_moments(make_tap, units, steps: int = 3, device: str = "cpu", **options):
    """In a worker, whose unit is the one of its rank: a few measured steps, of which the first
    rebuilds the buckets; the last one's moments."""
    model = ToyDetector(width=32).to(device)
    ddp = DistributedDataParallel(model, **{"bucket_cap_mb": 0.002, **options})
    tap = make_tap(ddp, assign_modules(ddp))
    for _ in range(steps):
        tap.start()
        ddp.zero_grad()
        loss(ddp, units[dist.get_rank()]).backward()
        tap.average_done()
        moments = tap.collect()
    return moments


def same_bits(moments) -> bool:
    """Have all workers the same?"""
    first, *others = moments
    return all(torch.equal(x, y) for m in others for x, y in zip(m[:2], first[:2]))


def __getattr__(name: str):
    """What needs Detectron2 (`toy_d2`), where it is asked for."""
    import toy_d2

    return getattr(toy_d2, name)
