"""Which way should a module's learning rate go, and what is a step of a large batch worth?
Curvature beside the noise scale.

On a quadratic whose modules have curvature c_i and noise scale B_i, the step that lowers the loss
most at batch B has the learning rates 1/(c_i (1 + B_i/B)). AGVM gives quiet modules more, the gain
noisy ones; neither knows c_i.

The gain takes one curvature for the mean gradient and for its noise. Where the mean gradient's,
c_mean, is larger than the noise's, c_noise, a step is worth less: the noise scale that counts is
B_i c_noise / c_mean (McCandlish et al. 2018, arXiv 1812.06162, eq. 2.8 against 2.9).
"""

from __future__ import annotations
from collections.abc import Sequence
import torch
from detectron2.engine import HookBase
from torch import nn

from agvm_d2.norms import Modules

AT = (0.1, 0.5, 0.95)  # of training
Gradients = dict[nn.Parameter, torch.Tensor]
MODEL = "model"  # beside the modules
IMAGES, STEP = 256, 1e-3  # of a measurement; of the module's norm


class Curvature(HookBase):
    """At some points of training, d' H d / |d|^2 of each module and of the whole model, by central
    differences: along the mean gradient of the samples, and along its noise, the difference of
    the gradients of their two halves.

    Args:
        modules: module -> parameters.
        samples: mapped images, the same each time.
        batch: images of a forward pass.
        at: iterations.
    """

    def __init__(self, modules: Modules, samples: Sequence[dict], batch: int, at: Sequence[int]):
        self.modules = {**modules, MODEL: [p for params in modules.values() for p in params]}
        self.samples, self.batch, self.at = samples, batch, at
        self.found: dict[int, dict[str, float]] = {}
        self.of_noise: dict[int, dict[str, float]] = {}

    def after_step(self) -> None:
        now, model = self.trainer.iter, self.trainer.model
        if now in self.at:
            with torch.random.fork_rng():
                half = len(self.samples) // 2
                first = self._gradients(model, self.samples[:half])
                second = self._gradients(model, self.samples[half : 2 * half])
                mean = {p: (first[p] + second[p]) / 2 for p in first}
                noise = {p: (first[p] - second[p]) / 2 for p in first}
                self.found[now] = self.along(mean, model)
                self.of_noise[now] = self.along(noise, model)

    def state_dict(self) -> dict:
        return {"found": self.found, "of_noise": self.of_noise}

    def load_state_dict(self, state: dict) -> None:
        self.found, self.of_noise = state["found"], state["of_noise"]

    def along(self, direction: Gradients, model: nn.Module) -> dict[str, float]:
        """Module -> curvature of the mean loss."""
        found = {}
        for name, params in self.modules.items():
            params = [p for p in params if p in direction]
            before = [p.detach().clone() for p in params]
            length = _norm([direction[p] for p in params])
            step = STEP * _norm(before) / length
            sides = []
            for side in (step, -step):
                moved = [x + side * direction[p] for x, p in zip(before, params, strict=True)]
                _place(params, moved)
                sides.append(self._gradients(model, self.samples))
            _place(params, before)
            change = sum(((sides[0][p] - sides[1][p]) * direction[p]).sum() for p in params)
            found[name] = float(change / (2 * step * length**2))
        return found

    def _gradients(self, model: nn.Module, samples: Sequence[dict]) -> Gradients:
        """Of the mean loss of the samples, with the same proposals drawn each time as far as the
        model's own outputs allow."""
        kept = {p: p.grad for p in model.parameters()}
        model.zero_grad(set_to_none=True)
        for start in range(0, len(samples), self.batch):
            torch.manual_seed(start)
            part = samples[start : start + self.batch]
            loss = sum(model([dict(s) for s in part]).values())
            (loss * len(part) / len(samples)).backward()
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
