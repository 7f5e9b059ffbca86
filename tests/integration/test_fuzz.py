"""1,000 steps of 4 workers with random modules, shapes, dtypes, missing and broken gradients."""

import math
import reference
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from agvm_d2.agvm import build_tap
from agvm_d2.modulator import Modulator
from agvm_d2.rules import variance_rule
from agvm_d2.settings import Settings

STEPS, STEPS_A_MODEL, WORKERS = 1000, 50, 4


class Linear(nn.Module):
    """loss = sum of p * x, so that each parameter's gradient is the x given for it."""

    def __init__(self, shapes, dtypes):
        super().__init__()
        self.params = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes)
        )
        for p in self.params:
            if p.ndim == 4:
                p.data = p.data.to(memory_format=torch.channels_last)

    def forward(self, xs):
        return sum(
            ((p * x).sum() for p, x in zip(self.params, xs) if x is not None), torch.zeros(())
        )


def random_model(g):
    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    shapes = []
    for _ in range(integer(3, 8)):
        ndim = (0, 1, 2, 4)[integer(0, 3)]
        shapes.append(tuple(integer(1, 9000 if ndim == 1 else 9) for _ in range(ndim)))
    dtypes = [(torch.float32, torch.float64)[integer(0, 1)] for _ in shapes]
    owners = [0, 1] + [integer(0, 3) for _ in shapes[2:]]
    return Linear(shapes, dtypes), owners


def gradients_of(model, owners, step, rank):
    """One worker's gradients, known to all: None where a module has none here, seldom a NaN."""
    g = torch.Generator().manual_seed(10_000 * step + rank)
    common = torch.Generator().manual_seed(10_000 * step + 9_999)
    missing = (torch.rand(4, generator=g) < 0.1) | (torch.rand(4, generator=common) < 0.05)
    xs = []
    for i, (p, owner) in enumerate(zip(model.params, owners)):
        scale = 10 ** (4 * torch.rand((), generator=common) - 2)
        signal = torch.randn(p.shape, generator=common)
        x = scale * (0.5 * signal + torch.randn(p.shape, generator=g)).to(p.dtype)
        xs.append(None if missing[owner] and i else x)  # DDP wants some gradient on each worker
    if torch.rand((), generator=g) < 0.02:
        broken = int(torch.randint(len(xs), (), generator=g))
        if xs[broken] is not None:
            xs[broken] = xs[broken] * math.nan
    return xs


def fuzz():
    """In a worker: the largest error of a variance and of a factor, and every factor's bits."""
    torch.manual_seed(0)
    shapes = torch.Generator().manual_seed(0)
    rank, worst, bits, seen = dist.get_rank(), 0.0, [], {"nan": 0, "missing": 0, "compared": 0}
    for step in range(STEPS):
        if step % STEPS_A_MODEL == 0:
            model, owners = random_model(shapes)
            names = [f"m{i}" for i in sorted(set(owners))]
            modules = {n: [p for p, o in zip(model.params, owners) if f"m{o}" == n] for n in names}
            ddp = DistributedDataParallel(model, bucket_cap_mb=0.02, find_unused_parameters=True)
            tap = build_tap(ddp, modules)
            rule = variance_rule(Settings(anchor="m0"), names, None)
            modulator = Modulator(names, rule, momentum=0.9)
        all_xs = [gradients_of(model, owners, step, r) for r in range(WORKERS)]
        tap.start()
        ddp.zero_grad()
        ddp(all_xs[rank]).backward()
        before = modulator.factors.tolist()
        modulator.update(tap.collect())
        bits.append(modulator.factors.tolist())

        variances = {}
        for i, name in enumerate(names):
            vectors = []
            for xs in all_xs:
                parts = [
                    (torch.zeros_like(p) if x is None else x).double().reshape(-1)
                    for p, x, o in zip(model.params, xs, owners)
                    if f"m{o}" == name
                ]
                vectors.append(torch.cat(parts))
            found = float(modulator.variance[i])
            if not all(v.isfinite().all() for v in vectors):
                seen["nan"] += 1
                assert math.isnan(found)
            elif not any(v.any() for v in vectors):
                seen["missing"] += 1
                assert math.isnan(found)
            else:
                seen["compared"] += 1
                variances[name] = reference.pairwise_variance(vectors)
                worst = max(worst, abs(found - variances[name]))
        if "m0" in variances:
            old = dict(zip(names, before))
            wanted = {**old, **reference.factors(old, variances, "m0", 0.9, (0.5, 10.0))}
        else:
            wanted = dict(zip(names, before))
        for found, exact in zip(modulator.factors.tolist(), wanted.values()):
            worst = max(worst, abs(found - exact))
    return worst, bits, seen


def test_a_thousand_steps_agree_with_the_reference_and_bit_for_bit_across_workers(workers):
    results = workers(WORKERS).run(fuzz)
    worst, bits, seen = results[0]
    assert worst <= 1e-5
    assert all(r[1] == bits for r in results)
    assert seen["nan"] > 50 and seen["missing"] > 50 and seen["compared"] > 2000
