"""The same on a GPU. What can run on a CPU does so, too, to show that the test itself is right.

One GPU is enough for all but `split` on NCCL: a single worker has NCCL's streams and DDP's buckets,
and two workers share a GPU over gloo.
"""

import contextlib
import warnings
import pytest
import reference
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from toy import MODULES, ToyDetector, batch, ddp_moments, factors, loss, same_bits, vectors
from toy_d2 import ToyLoader

from agvm_d2 import AGVM, AGVMHook, Settings, norms, split_param_groups
from agvm_d2.agvm import build_tap
from agvm_d2.d2.micro_batches import MicroBatchTrainer
from agvm_d2.modules import assign_modules
from agvm_d2.norms import block_norms
from agvm_d2.solver import clip_gradients, skip_nonfinite_steps
from agvm_d2.split import SplitBucketTap

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
BACKEND = {"cpu": "gloo", "cuda": "nccl"}


def put(data, device):
    return [{key: value.to(device) for key, value in record.items()} for record in data]


@DEVICE
def test_block_norms_are_exact_to_1e6_at_40_million(device):
    torch.manual_seed(0)
    tensor = torch.randn(40_000_000, device=device).mul_(1e-3)
    exact = float(tensor.double().square().sum())
    total = sum(n.double().square().sum() for n in block_norms([tensor])[0])
    assert float(total) == pytest.approx(exact, rel=1e-6)


@DEVICE
def test_half_precision_norms_do_not_overflow(device):
    tensor = torch.full((1000,), 1000.0, dtype=torch.float16, device=device)
    assert float(block_norms([tensor])[0][0]) == pytest.approx(1000 * 1000**0.5, rel=1e-5)


# One process


@DEVICE
@pytest.mark.parametrize("precision", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_micro_batches_with_a_grad_scaler(device, precision, fused):
    model = ToyDetector().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused, foreach=False)
    split_param_groups(optimizer, model)
    scaler = torch.amp.GradScaler(device, init_scale=256.0) if precision else None
    trainer = MicroBatchTrainer(model, ToyLoader(8), optimizer, 2, scaler, precision)
    hook = AGVMHook(model, optimizer, interval=1, start_iter=1, micro_batches=4, momentum=0.5)
    trainer.register_hooks([hook])
    trainer.train(0, 3)
    assert (hook.modulator.factors[1:] != 1).all() and hook.modulator.factors.isfinite().all()
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}


@DEVICE
def test_factors_equal_the_reference(device):
    model = ToyDetector()
    units = [batch(4, seed=0), batch(4, seed=1)]
    wanted = factors(model, units)
    model.to(device)
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


@DEVICE
def test_a_skipped_step_puts_the_statistics_back(device):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skip_nonfinite_steps(optimizer, model)
    with EventStorage():
        for value in (1.0, float("nan")):
            model(torch.full((4, 3), value, device=device)).sum().backward()
            optimizer.step()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model[1].num_batches_tracked == 1


def kernels_of(step, *args):
    """How many kernels a call runs on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(*args)
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not kernel.name.startswith("Mem") for kernel in kernels)


def clipped(device, after=None):
    """What is left of each of 300 parameters' gradients; `after(step)` runs a late step."""
    params = [nn.Parameter(torch.zeros(8, device=device)) for _ in range(300)]
    optimizer = torch.optim.SGD(params, lr=1.0, foreach=True)
    clip_gradients(optimizer, "relative", 4.0)
    for norm in (1.0, 1.0, 100.0):
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, norm * (i + 1) / 1000)
        if after and norm == 100:
            after(optimizer.step)
        else:
            optimizer.step()
    return torch.stack([p.grad for p in params]).cpu()


@DEVICE
def test_relative_clipping(device):
    usual = torch.arange(1, 301)[:, None].expand(-1, 8) / 1000
    assert torch.allclose(clipped(device), 4 * usual, rtol=1e-5)


@CUDA
def test_relative_clipping_waits_for_nothing_and_has_few_kernels():
    def without_waiting(step):
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    clipped("cuda", without_waiting)
    found = []
    clipped("cuda", lambda step: found.append(kernels_of(step)))
    assert 0 < found[0] < 60  # of 300 parameters


@CUDA
def test_the_capture_of_a_graph_is_refused():
    model = ToyDetector().cuda()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    agvm, number = AGVM(model, optimizer, micro_batches=2), torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        number.add_(1)
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            agvm.begin(0)
    agvm.begin(0)


# DDP: one worker on NCCL, with two micro-batches; on a CPU, over gloo


def train(device, kind, iterations, ddp=True, settings=None, after=None):
    """In a worker; `after(step, iteration)` runs `step`. The factors."""
    model = ToyDetector().to(device)
    optimizer = split_param_groups(kind(model.parameters(), lr=0.01), model)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.0005) if ddp else model
    settings = settings or Settings(interval=1, start_iter=0, momentum=0.5)
    agvm = AGVM(wrapped, optimizer, settings, micro_batches=2)
    data = [put(batch(4, seed=i), device) for i in range(2 * iterations)]

    def step(iteration):
        first, second = data[2 * iteration : 2 * iteration + 2]
        agvm.begin(iteration)
        with wrapped.no_sync() if ddp else contextlib.nullcontext():
            (loss(wrapped, first) / 2).backward()
        agvm.micro_batch_done(0.5)
        (loss(wrapped, second) / 2).backward()
        agvm.micro_batch_done(0.5)
        agvm.backward_done()
        optimizer.step()
        optimizer.zero_grad()
        agvm.end()

    for iteration in range(iterations):
        after(step, iteration) if after else step(iteration)
    return agvm.modulator.factors.tolist()


@DEVICE
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_ddp_with_micro_batches(workers, device, kind):
    (found,) = workers(1, BACKEND[device]).run(train, device, kind, 4)
    wanted = train("cpu", kind, 4, ddp=False)
    assert found == pytest.approx(wanted, rel=1e-3) and found[1] != 1


def _synchronisations():
    """In a worker: of each iteration, how often it waited for the GPU."""
    found = []

    def count(step, iteration):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(iteration)
        found.append(sum("synchronizing CUDA operation" in str(w.message) for w in caught))

    torch.cuda.set_sync_debug_mode("warn")
    try:
        train("cuda", torch.optim.SGD, 6, settings=EVERY_SECOND, after=count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found


EVERY_SECOND = Settings(interval=2, start_iter=0)


@CUDA
def test_a_measured_step_waits_once_for_the_gpu_and_others_never(workers):
    (found,) = workers(1, "nccl").run(_synchronisations)
    assert found[2:] == [1, 0, 1, 0]  # after DDP has rebuilt its buckets


def _kernels():
    """In a worker: of each iteration, how many kernels it ran."""
    found = []

    def count(step, iteration):
        found.append(kernels_of(step, iteration))

    train("cuda", torch.optim.SGD, 6, settings=EVERY_SECOND, after=count)
    return found


@CUDA
def test_kernels_of_a_measurement_are_bounded(workers):
    (found,) = workers(1, "nccl").run(_kernels)
    params, passes = len([*ToyDetector().parameters()]), 2
    more = found[2] - found[3]
    assert 0 < more <= (passes + 1) * (4 * params + 8 * len(MODULES)) + 40
    assert found[4] - found[5] == pytest.approx(more, rel=0.2)


# DDP: one unit per worker; of a single one, S1 and S2 are its gradient's squared norm


class Net(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 1)
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            x = checkpoint(self.backbone, x, use_reentrant=False)
        else:
            x = self.backbone(x)
        return self.head(x.tanh().mean((2, 3))).float().square().mean()


IMAGES = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def slow_measurements(device):
    """On whatever stream they run: who reads them too early finds other numbers."""
    original = norms.block_norms

    def slow(tensors):
        if device == "cuda":
            torch.cuda._sleep(100_000_000)  # cycles: about 0.05 s
        return original(tensors)

    norms.block_norms = slow
    try:
        yield
    finally:
        norms.block_norms = original


def rows(device, case, slow=False):
    """In a worker: the two rows of squared norms of a few measured steps, the last one's."""
    torch.backends.cudnn.allow_tf32 = False
    model, images = Net(checkpointed=case == "checkpointed").to(device), IMAGES.to(device)
    inner = None
    if case == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if case == "bfloat16":
        model, images = model.bfloat16(), images.bfloat16()
    if case.endswith("_hook"):
        inner = None, getattr(default_hooks, case)
    flags = ("gradient_as_bucket_view", "find_unused_parameters", "static_graph")
    size = 25 if case == "compiled" else 0.0005  # dynamo takes none below DDP's first bucket
    options = {flag: True for flag in flags if case == flag}
    ddp = DistributedDataParallel(model, bucket_cap_mb=size, **options)
    run = torch.compile(ddp, backend="aot_eager") if case == "compiled" else ddp
    tap = build_tap(run, assign_modules(ddp), inner=inner)
    with slow_measurements(device) if slow else contextlib.nullcontext():
        for _ in range(3):
            tap.start()
            ddp.zero_grad()
            run(images).backward()
            tap.average_done()
            found, units = tap.local()
            tap.stop()
    assert units == 1
    return found.cpu()


CASES = {
    "plain": 1e-4,
    "gradient_as_bucket_view": 1e-4,
    "find_unused_parameters": 1e-4,
    "static_graph": 1e-4,
    "compiled": 1e-4,
    "checkpointed": 1e-4,
    "channels_last": 1e-4,
    "fp16_compress_hook": 2e-3,
    "bf16_compress_hook": 2e-2,
    "bfloat16": 5e-2,
}


@DEVICE
@pytest.mark.parametrize("case", CASES)
def test_ddp_with_one_unit(workers, device, case):
    (found,) = workers(1, BACKEND[device]).run(rows, device, case)
    model = Net()
    (gradient,) = reference.unit_gradients(model, lambda net, x: net(x), [IMAGES])
    for i, module in enumerate(assign_modules(model)):
        names = [name for name in gradient if name.startswith(module)]
        wanted = reference.moments(reference.flatten([gradient], names))
        assert found[:, i].tolist() == pytest.approx(wanted, rel=CASES[case])


@DEVICE
@pytest.mark.parametrize("case", ["plain", "bf16_compress_hook", "bfloat16"])
def test_no_number_is_read_before_it_is_there(workers, device, case):
    pool = workers(1, BACKEND[device])
    (fast,), (slow,) = pool.run(rows, device, case), pool.run(rows, device, case, True)
    assert torch.equal(fast, slow)


def _split(device, units, slow):
    torch.manual_seed(0)
    with slow_measurements(device) if slow else contextlib.nullcontext():
        return ddp_moments(SplitBucketTap, [put(u, device) for u in units], device=device)


@DEVICE
@pytest.mark.parametrize("slow", [False, True])
def test_split(workers, device, slow):
    num = 4 if device == "cpu" else min(torch.cuda.device_count(), 4)
    if num < 3:
        pytest.skip("a half of one worker is not reduced: needs 3 GPUs, better 4")
    units = [batch(4, seed=rank) for rank in range(num)]
    results = workers(num, BACKEND[device]).run(_split, device, units, slow)
    assert same_bits(results)
    cut = (num + 1) // 2
    for i, found in enumerate(vectors(ToyDetector(width=32), units).values()):
        wanted = reference.split_variance(found[:cut], found[cut:])
        assert float(results[0].variance[i]) == pytest.approx(wanted, abs=1e-4)


def _pairwise(ddp, modules):
    return build_tap(ddp, modules)


@CUDA
@pytest.mark.parametrize("make_tap", [_pairwise, SplitBucketTap])
def test_two_workers_on_one_gpu_over_gloo(workers, make_tap):
    units = [batch(4, seed=rank) for rank in range(2)]
    results = workers(2).run(_on_gpu_0, make_tap, units)
    assert same_bits(results)
    for i, found in enumerate(vectors(ToyDetector(width=32), units).values()):
        s1, s2 = reference.moments(found)
        assert float(results[0].unit_sq[i]) == pytest.approx(s1, rel=1e-4)
        assert float(results[0].mean_sq[i]) == pytest.approx(s2, rel=1e-4)


def _on_gpu_0(make_tap, units):
    return ddp_moments(make_tap, units, device="cuda:0")


def _reserved():
    """In a worker: bytes that torch holds after unmeasured steps, and after 40 measured ones."""
    layers = [nn.Linear(1024, 1024) for _ in range(8)]
    model = nn.Sequential(*layers).cuda().bfloat16()
    ddp = DistributedDataParallel(model, bucket_cap_mb=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tap = build_tap(ddp, {"all": [*model.parameters()]}, optimizer=optimizer)
    found = []
    for steps, measured in ((5, False), (40, True)):
        for _ in range(steps):
            if measured:
                tap.start()
            ddp(torch.ones(16, 1024, device="cuda").bfloat16()).float().square().mean().backward()
            if measured:
                tap.average_done()
                tap.local()
                tap.stop()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        found.append(torch.cuda.memory_reserved())
    return found


@CUDA
def test_measurements_hold_no_more_memory_than_some_copies_of_the_gradients(workers):
    ((before, after),) = workers(1, "nccl").run(_reserved)
    assert after - before <= 4 * (4 * 8 * 1024 * 1025)  # in float32
