"""Training loops shaped like those of public projects, written anew: what AGVM measures in them is
what the reference finds for the same weights and images."""

import copy
import functools
import pytest
import reference
import torch
import torch.distributed as dist
from detectron2.engine import HookBase, SimpleTrainer
from torch.nn.parallel import DistributedDataParallel
from toy import MODULES, ToyDetector, vectors
from toy_d2 import ToyLoader

from agvm_d2 import AGVMHook, split_param_groups

WORKERS, SIZE, ITERATIONS = 2, 8, 5


class OwnStep(SimpleTrainer):
    """detrex's: AMP and clipping in one run_step, which calls no hook between them."""

    def __init__(self, model, loader, optimizer, amp=False):
        super().__init__(model, loader, optimizer)
        self.amp = amp
        self.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=amp)

    def run_step(self):
        data = next(self._data_loader_iter)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            losses = self.model(data)
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._write_metrics(losses, 0.0)


class Average(HookBase):
    """detrex's and others' EMA of the weights."""

    def __init__(self, model):
        self.model, self.ema = model, copy.deepcopy(model)

    def after_step(self):
        average(self.ema, self.model)


def average(ema, model, share=0.9):
    with torch.no_grad():
        for mine, new in zip(ema.parameters(), model.parameters(), strict=True):
            mine.mul_(share).add_(new, alpha=1 - share)


class TeacherAndStudent(SimpleTrainer):
    """Unbiased Teacher's: the student alone first; then also on what its average, the teacher,
    finds in other images. Two forward passes, one backward pass."""

    burn_in = 2

    def __init__(self, model, loader, optimizer):
        super().__init__(model, loader, optimizer)
        self.teacher = copy.deepcopy(model.module).eval()

    def losses(self, model, data):
        """Of one worker's images; the teacher labels the second half of them."""
        half = len(data) // 2
        losses = model(data[:half])
        if self.iter >= self.burn_in:
            found = self.teacher(data[half:])["loss_box"].detach()
            pseudo = [{**record, "target": record["target"] * found} for record in data[half:]]
            more = model(pseudo)
            losses = {k: v + 0.5 * more[k] for k, v in losses.items()}
        return losses

    def run_step(self):
        data = next(self._data_loader_iter)
        losses = self.losses(self.model, data)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        average(self.teacher, self.model.module)


class Before(HookBase):
    """Of the last iteration, by the reference: the variances of the weights that it begins with."""

    def __init__(self, model):
        self.model = model

    def before_step(self):
        trainer = self.trainer
        if trainer.iter == ITERATIONS - 1:
            images = [data for data, _ in zip(ToyLoader(SIZE), range(ITERATIONS))][-1]
            share = SIZE // WORKERS
            units = [images[rank * share :][:share] for rank in range(WORKERS)]
            losses = getattr(trainer, "losses", lambda model, data: model(data))
            total = functools.partial(self.total, losses)
            gradients = vectors(copy.deepcopy(self.model), units, total)
            self.variances = [reference.pairwise_variance(g) for g in gradients.values()]

    @staticmethod
    def total(losses, model, data):
        return sum(losses(model, data).values())


def train(kind, options):
    """In a worker: variances of the last iteration, measured and by the reference; factors."""
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.05), model)
    ddp = DistributedDataParallel(model)
    trainer = kind(ddp, ToyLoader(SIZE, dist.get_rank(), WORKERS), optimizer, **options)
    before = Before(model)
    agvm = AGVMHook(ddp, optimizer, interval=1, momentum=0.5, batch_size=SIZE)
    ema = Average(model)
    trainer.register_hooks([before, ema, agvm])
    trainer.train(0, ITERATIONS)
    assert any(not torch.equal(a, b) for a, b in zip(ema.ema.parameters(), model.parameters()))
    return agvm.modulator.variance.tolist(), before.variances, agvm.modulator.factors.tolist()


@pytest.mark.parametrize(
    "kind, options, rel",
    [
        (OwnStep, {}, 1e-4),
        (OwnStep, {"amp": True}, 0.05),  # bfloat16 has 8 bits
        (TeacherAndStudent, {}, 1e-4),
    ],
    ids=["own run_step", "own run_step with AMP", "teacher and student"],
)
def test_what_is_measured_is_the_reference_s(workers, kind, options, rel):
    results = workers(WORKERS).run(train, kind, options)
    for measured, wanted, factors in results:
        assert measured == pytest.approx(wanted, rel=rel) and len(measured) == len(MODULES)
        assert factors[0] == 1 and all(f != 1 for f in factors[1:])
    assert results[0][2] == results[1][2]
