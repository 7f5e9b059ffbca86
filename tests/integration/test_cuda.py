"""The same on a GPU: one is enough, the two workers share it over gloo."""

import pytest
import reference
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy import ToyDetector, batch, factors, loss, same_bits, vectors
from toy_d2 import ToyLoader

from agvm_d2 import AGVM, AGVMHook, Settings, split_param_groups
from agvm_d2.d2.micro_batches import MicroBatchTrainer
from agvm_d2.modules import assign_modules
from agvm_d2.moments import BucketTap
from agvm_d2.norms import block_norms
from agvm_d2.split import SplitBucketTap

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
    wanted = factors(model, units)
    model.cuda()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    agvm = AGVM(model, optimizer, Settings(momentum=0.5), micro_batches=2)
    agvm.begin(0)
    for unit in units:
        (loss(model, unit) / 2).backward()
        agvm.micro_batch_done(0.5)
    agvm.backward_done()
    optimizer.step()
    agvm.end()
    assert agvm.modulator.factors.tolist() == pytest.approx(list(wanted.values()), rel=1e-4)


def _two_workers_on_one_gpu(units, tap_class):
    ddp = DistributedDataParallel(ToyDetector(width=32).cuda(), bucket_cap_mb=0.002)
    tap = tap_class(ddp, assign_modules(ddp))
    for _ in range(3):
        tap.start()
        ddp.zero_grad()
        loss(ddp, units[dist.get_rank()]).backward()
        moments = tap.collect()
    return moments


@pytest.mark.parametrize("tap_class", [BucketTap, SplitBucketTap])
def test_two_workers(workers, tap_class):
    units = [batch(4, seed=rank) for rank in range(2)]
    results = workers(2).run(_two_workers_on_one_gpu, units, tap_class)
    assert same_bits(results)
    for i, found in enumerate(vectors(ToyDetector(width=32), units).values()):
        s1, s2 = reference.moments(found)
        assert float(results[0].unit_sq[i]) == pytest.approx(s1, rel=1e-4)
        assert float(results[0].mean_sq[i]) == pytest.approx(s2, rel=1e-4)
