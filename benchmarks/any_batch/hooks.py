"""What a run keeps of its training, and the arms that a rule of moments alone cannot be."""

from __future__ import annotations
import math
import time
import torch
from detectron2.engine import HookBase

from agvm_d2.agvm import AGVM
from agvm_d2.moments import Moments
from agvm_d2.progress import Progress

POINTS = 60  # of each curve that a run keeps


class Curves(HookBase):
    """AGVM's scalars of each measured iteration with the loss, its median over 20 iterations, and
    the seconds; all outlive a resume."""

    def __init__(self, agvm: AGVM | None):
        self.agvm = agvm
        self.rows: list[dict] = []
        self.before, self.start = 0.0, time.time()

    @property
    def seconds(self) -> float:
        return self.before + time.time() - self.start

    def after_step(self) -> None:
        if self.agvm is not None and self.agvm.measured:
            loss = float(self.trainer.storage.history("total_loss").median(20))
            now = {"iteration": self.trainer.iter, "loss": loss}
            self.rows.append({**now, **self.agvm.scalars()})

    def thin(self) -> dict[str, list]:
        """Scalar -> values, None where it was not measurable."""
        rows = self.rows[:: max(1, len(self.rows) // POINTS)]
        names = sorted({name for row in rows for name in row})
        return {
            name.removeprefix("agvm/"): [
                None if name not in row else float(f"{row[name]:.4g}") for row in rows
            ]
            for name in names
        }

    def state_dict(self) -> dict:
        return {"rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.rows, self.before = state["rows"], state["seconds"]


class KeepDecay(HookBase):
    """From the first drop of the learning rate on, the factors stay as they are."""

    def __init__(self, agvm: AGVM, drop: int):
        self.agvm, self.drop = agvm, drop

    def after_step(self) -> None:
        if self.agvm.progress >= self.drop:
            self.agvm.modulator.rule = lambda moments: torch.full_like(moments.unit_sq, torch.nan)


class ModelGain(Progress):
    """A step counts as many steps of the base batch as the whole model's gain, as it did before the
    smallest module's was chosen."""

    @property
    def gain(self) -> float:
        return self.gains[-1].item()


class Profile(HookBase):
    """The rule's factors times a profile over the modules that training learns itself: where a
    module's gradient still points along its momentum, its rate was too small, where against it,
    too large (as the hypergradient of Baydin et al. 2018, arXiv 1703.04782).

    log profile_i += rate cos(g_i, momentum buffer_i), less the modules' mean; in [1/limit, limit].
    The inner product could be one more number per module in the same all-reduce.
    """

    def __init__(self, agvm: AGVM, rate: float = 0.05, limit: float = 10.0):
        self.agvm, self.rate, self.limit = agvm, rate, math.log(limit)
        self.rule = agvm.modulator.rule
        self.log = torch.zeros(len(agvm.modules), dtype=torch.float64)
        agvm.modulator.rule = self

    def __call__(self, moments: Moments) -> torch.Tensor:
        cos = torch.tensor([self._cosine(params) for params in self.agvm.modules.values()])
        log = self.log + self.rate * (cos - cos.mean())
        self.log = (log - log.mean()).clamp(-self.limit, self.limit)
        return self.rule(moments) * self.log.exp()

    @torch.no_grad()
    def _cosine(self, params: list[torch.nn.Parameter]) -> float:
        """Of the gradient and the momentum buffer, which is without it; 0 before the first step."""
        state = self.agvm.optimizer.state
        product = grad_sq = buffer_sq = 0.0
        for p in params:
            buffer = state[p].get("momentum_buffer") if p in state else None
            if p.grad is not None and buffer is not None:
                product += (p.grad * buffer).sum().item()
                grad_sq += p.grad.square().sum().item()
                buffer_sq += buffer.square().sum().item()
        return product / math.sqrt(grad_sq * buffer_sq) if grad_sq * buffer_sq else 0.0

    def state_dict(self) -> dict:
        return {"log": self.log.tolist()}

    def load_state_dict(self, state: dict) -> None:
        self.log = torch.tensor(state["log"], dtype=torch.float64)
