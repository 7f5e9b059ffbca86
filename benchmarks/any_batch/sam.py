"""Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412), the trainer of
docs/extending.md in the study's setting."""

from __future__ import annotations
import torch
from detectron2.engine import SimpleTrainer
from detectron2.solver.build import get_default_optimizer_params
from pytorch_optimizer import SAM

from .trainer import Trainer

RHO = 0.05


class TwoPasses(SimpleTrainer):
    """BatchNorm is frozen here, so its statistics need no care."""

    def run_step(self) -> None:
        data = next(self._data_loader_iter)

        def backward() -> dict[str, torch.Tensor]:
            self.optimizer.zero_grad()
            losses = self.model(data)
            sum(losses.values()).backward()
            return losses

        self._write_metrics(backward(), data_time=0.0)
        self.optimizer.step(backward)


class SAMTrainer(Trainer):
    @classmethod
    def build_optimizer(cls, cfg, model):
        solver = cfg.SOLVER
        params = get_default_optimizer_params(model, solver.BASE_LR, solver.WEIGHT_DECAY)
        return SAM(params, torch.optim.SGD, rho=RHO, lr=solver.BASE_LR, momentum=solver.MOMENTUM)

    def __init__(self, cfg):
        super().__init__(cfg)
        stock = self._trainer
        self._trainer = TwoPasses(stock.model, stock.data_loader, stock.optimizer)
