"""FSDP2 on a GPU, with one worker of several micro-batches; and, to show that the test itself is
right, on a CPU."""

import pytest
import torch
from test_sharded import DEFAULTS, MODULES, VARIANTS, _moments, fsdp, units_of, wanted

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
BACKEND = {"cpu": "gloo", "cuda": "nccl"}
OFFLOADED = {"offload_policy": fsdp.CPUOffloadPolicy()}
CASES = {
    **{name: v for name, v in VARIANTS.items() if "replicas" not in v},
    "offloaded": {"options": OFFLOADED},
    "offloaded, Adam": {"options": OFFLOADED, "adam": True},
}


@DEVICE
@pytest.mark.parametrize("largest", [None, 0], ids=["gathered", "own shard"])
@pytest.mark.parametrize("name", CASES)
def test_moments_equal_reference(workers, device, name, largest):
    variant = {**DEFAULTS, **CASES[name]}
    micro = variant["micro"] = max(2, variant["micro"])
    if device == "cpu" and "offloaded" in name:
        pytest.skip("there is nothing to offload")
    found = workers(1, BACKEND[device]).run(_moments, *variant.values(), largest, device)
    moments, weights, second, _ = found[0]
    rel = 1e-2 if "bfloat16" in name else 1e-4
    for i, (s1, s2) in enumerate(wanted(weights, second, units_of(1, micro))):
        assert float(moments.unit_sq[i]) == pytest.approx(s1, rel=1e-4), MODULES[i]
        assert float(moments.mean_sq[i]) == pytest.approx(s2, rel=rel), MODULES[i]
