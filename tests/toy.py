"""A toy detector: Detectron2's calling convention and module names, a few hundred parameters."""

from __future__ import annotations
import torch
from detectron2.config import get_cfg
from torch import nn

from agvm_d2 import AGVMTrainer, add_agvm_config

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


def toy_config(output_dir, **options):
    """A config for ToyTrainer; options as SOLVER__BASE_LR=0.1."""
    cfg = get_cfg()
    add_agvm_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = str(output_dir)
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.MAX_ITER = 10
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.CHECKPOINT_PERIOD = 1000
    cfg.DATASETS.TEST = ()
    cfg.AGVM.START_ITER = 2
    cfg.AGVM.INTERVAL = 2
    cfg.AGVM.MOMENTUM = 0.5
    cfg.merge_from_list([x for k, v in options.items() for x in (k.replace("__", "."), v)])
    return cfg


class ToyLoader:
    """Batch i is a function of i alone; each worker takes its share. No end."""

    def __init__(self, size: int, rank: int = 0, num_workers: int = 1):
        self.size, self.rank, self.num_workers = size, rank, num_workers

    def __iter__(self):
        i, share = 0, self.size // self.num_workers
        while True:
            yield batch(self.size, seed=1000 + i)[self.rank * share :][:share]
            i += 1


class ToyTrainer(AGVMTrainer):
    @classmethod
    def build_model(cls, cfg):
        return ToyDetector()

    @classmethod
    def build_train_loader(cls, cfg):
        from detectron2.utils import comm

        return ToyLoader(cfg.SOLVER.IMS_PER_BATCH, comm.get_rank(), comm.get_world_size())


def train(cfg, trainer_class=ToyTrainer, resume: bool = False):
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    from agvm_d2.modules import unwrap

    return {k: v.clone() for k, v in unwrap(trainer.model).state_dict().items()}


def agvm_hook(trainer):
    from agvm_d2 import AGVMHook

    return next(h for h in trainer._hooks if isinstance(h, AGVMHook))
