"""The same on a GPU: one is enough, the two workers share it over gloo."""

import pytest
import reference
import torch
import torch.distributed as dist
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel
from toy import MODULES, ToyDetector, ToyLoader, batch, loss, parameter_names

from agvm_d2 import AGVMHook, split_param_groups
from agvm_d2.d2.micro_batches import MicroBatchTrainer
from agvm_d2.modules import assign_modules
from agvm_d2.moments import BucketTap
from agvm_d2.norms import block_norms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_block_norms_are_exact_to_1e6_at_40_million():
    torch.manual_seed(0)
    tensor = torch.randn(40_000_000, device="cuda").mul_(1e-3)
    exact = float(tensor.double().square().sum())
    total = sum(n.double().square().sum() for n in block_norms([tensor])[0])
    assert float(total) == pytest.approx(exact, rel=1e-6)


def test_half_precision_norms_do_not_overflow():
    tensor = torch.full((1000,), 1000.0, dtype=torch.float16, device="cuda")
    assert float(block_norms([tensor])[0][0]) == pytest.approx(1000 * 1000**0.5, rel=1e-5)


@pytest.mark.parametrize("precision", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_micro_batches_with_a_grad_scaler(precision, fused):
    model = ToyDetector().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused, foreach=False)
    split_param_groups(optimizer, model)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0) if precision else None
    trainer = MicroBatchTrainer(model, ToyLoader(8), optimizer, 2, scaler, precision)
    hook = AGVMHook(model, optimizer, interval=1, start_iter=1, micro_batches=4, momentum=0.5)
    trainer.register_hooks([hook])
    trainer.train(0, 3)
    assert (hook.modulator.factors[1:] != 1).all() and hook.modulator.factors.isfinite().all()
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}


def test_factors_equal_the_reference():
    model = ToyDetector()
    units = [batch(4, seed=0), batch(4, seed=1)]
    gradients = reference.unit_gradients(model, loss, units)
    variances = {
        m: reference.pairwise_variance(reference.flatten(gradients, names))
        for m, names in parameter_names(model).items()
    }
    wanted = reference.factors(dict.fromkeys(MODULES, 1.0), variances, "backbone", 0.5, (0.5, 10))
    model.cuda()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    hook = AGVMHook(model, optimizer, interval=1, micro_batches=2, momentum=0.5)
    hook.before_train()
    with EventStorage(0):
        hook.before_step()
        for unit in units:
            (loss(model, unit) / 2).backward()
            hook.after_micro_batch(0.5)
        hook.after_backward()
        optimizer.step()
        hook.after_step()
    assert hook.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-4)


def _two_workers_on_one_gpu(units, split):
    model = ToyDetector(width=32).cuda()
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    tap = BucketTap(ddp, assign_modules(model), split=split)
    for _ in range(3):
        tap.start()
        ddp.zero_grad()
        loss(ddp, units[dist.get_rank()]).backward()
        moments = tap.collect()
    return moments


@pytest.mark.parametrize("split", [False, True])
def test_two_workers(workers, split):
    units = [batch(4, seed=rank) for rank in range(2)]
    results = workers(2).run(_two_workers_on_one_gpu, units, split)
    assert torch.equal(results[0].unit_sq, results[1].unit_sq)
    gradients = reference.unit_gradients(ToyDetector(width=32), loss, units)
    for i, names in enumerate(parameter_names(ToyDetector()).values()):
        s1, s2 = reference.moments(reference.flatten(gradients, names))
        assert float(results[0].unit_sq[i]) == pytest.approx(s1, rel=1e-4)
        assert float(results[0].mean_sq[i]) == pytest.approx(s2, rel=1e-4)
