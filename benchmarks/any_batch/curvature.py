"""Which way should a module's learning rate go? Each module's curvature beside its noise scale.

On a quadratic whose modules have curvature c_i and noise scale B_i, the step that lowers the loss
most at batch B has the learning rates 1/(c_i (1 + B_i/B)). AGVM gives quiet modules more, the gain
noisy ones; neither knows c_i.
"""

from __future__ import annotations
from collections.abc import Sequence
import torch
from detectron2.engine import HookBase
from torch import nn

from agvm_d2.norms import Modules

AT = (0.1, 0.5, 0.95)  # of training
IMAGES, STEP = 256, 1e-3  # of a measurement; of the module's norm


class Curvature(HookBase):
    """At some points of training, g_i' H g_i / |g_i|^2 of each module, by central differences.

    Args:
        modules: module -> parameters.
        samples: mapped images, the same each time.
        batch: images of a forward pass.
        at: iterations.
    """

    def __init__(self, modules: Modules, samples: Sequence[dict], batch: int, at: Sequence[int]):
        self.modules, self.samples, self.batch, self.at = modules, samples, batch, at
        self.found: dict[int, dict[str, float]] = {}

    def after_step(self) -> None:
        if self.trainer.iter in self.at:
            with torch.random.fork_rng():
                self.found[self.trainer.iter] = self.measure(self.trainer.model)

    def state_dict(self) -> dict:
        return {"found": self.found}

    def load_state_dict(self, state: dict) -> None:
        self.found = state["found"]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Module -> curvature of the mean loss along its gradient."""
        grads = self._gradients(model)
        found = {}
        for name, params in self.modules.items():
            params = [p for p in params if p in grads]
            before = [p.detach().clone() for p in params]
            length = _norm([grads[p] for p in params])
            step = STEP * _norm(before) / length
            sides = []
            for side in (step, -step):
                _place(params, [x + side * grads[p] for x, p in zip(before, params, strict=True)])
                sides.append(self._gradients(model))
            _place(params, before)
            change = sum(((sides[0][p] - sides[1][p]) * grads[p]).sum() for p in params)
            found[name] = float(change / (2 * step * length**2))
        return found

    def _gradients(self, model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
        """Of the mean loss of all samples, with the same proposals drawn each time as far as the
        model's own outputs allow."""
        kept = {p: p.grad for p in model.parameters()}
        model.zero_grad(set_to_none=True)
        for start in range(0, len(self.samples), self.batch):
            torch.manual_seed(start)
            part = self.samples[start : start + self.batch]
            loss = sum(model([dict(s) for s in part]).values())
            (loss * len(part) / len(self.samples)).backward()
        grads = {p: p.grad for p in kept if p.grad is not None}
        for p, grad in kept.items():
            p.grad = grad
        return grads


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return sum(t.detach().square().sum().item() for t in tensors) ** 0.5


@torch.no_grad()
def _place(params: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)
