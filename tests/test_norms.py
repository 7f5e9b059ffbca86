import pytest
import torch
from torch import nn

from agvm_d2.norms import BLOCK, ModuleNorms, block_norms


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(7.0),
        torch.ones(BLOCK),
        torch.ones(2 * BLOCK + 5),
        torch.ones(3, 4, 5, 6).to(memory_format=torch.channels_last),
        torch.ones(5, 6).t(),
        torch.ones(10, 10)[:, ::2],
        torch.full((8,), 1000.0, dtype=torch.float16),  # its square overflows float16
        torch.ones(4, dtype=torch.bfloat16),
        torch.ones(4, dtype=torch.float64),
        torch.tensor(3.0),
        torch.ones(0),
    ],
    ids=str,
)
def test_block_norms_of_one(tensor):
    total = sum(n.double().square().sum() for n in block_norms([tensor])[0])
    assert float(total) == pytest.approx(float(tensor.double().square().sum()), rel=1e-6)


def test_block_norms_keep_the_order_of_a_mixed_list():
    tensors = [
        torch.full((n,), value)
        for n, value in ((3, 3.0), (BLOCK + 1, 2.0), (1, 1.0), (0, 9.0), (4, 4.0))
    ]
    found = [sum(n.double().square().sum() for n in norms) for norms in block_norms(tensors)]
    assert [float(f) for f in found] == pytest.approx([27, 4 * (BLOCK + 1), 1, 0, 64], rel=1e-6)
    assert block_norms([]) == []


def test_block_norms_are_exact_to_1e6_at_40_million():
    torch.manual_seed(0)
    tensor = torch.randn(40_000_000).mul_(1e-3)
    exact = sum(float(part.double().square().sum()) for part in tensor.split(1_000_000))
    total = sum(n.double().square().sum() for n in block_norms([tensor])[0])
    assert float(total) == pytest.approx(exact, rel=1e-6)


def test_a_sparse_gradient_is_refused():
    with pytest.raises(ValueError, match=r"shape \(5, 2\) has a sparse gradient.*sparse=False"):
        block_norms([torch.ones(5, 2).to_sparse()])


def parameters(*sizes):
    return [nn.Parameter(torch.zeros(n)) for n in sizes]


def test_module_norms_by_hand():
    one, two, three = parameters(2, 1, BLOCK + 1)
    norms = ModuleNorms({"a": [one, two], "b": [three], "c": parameters(1)})
    norms.add([three], [torch.full((BLOCK + 1,), 2.0)])
    norms.add([two, one], [torch.tensor([5.0]), torch.tensor([3.0, 4.0])])
    total = norms.total(torch.device("cpu"))
    assert total.dtype == torch.float64
    assert total.tolist() == pytest.approx([50.0, 4.0 * (BLOCK + 1), 0.0], rel=1e-6)


def test_the_sum_is_exact_in_float64():
    one, two = parameters(1, 1)
    norms = ModuleNorms({"all": [one, two]})
    norms.add([one, two], [torch.tensor([1e4]), torch.tensor([1.0])])
    assert norms.total(torch.device("cpu")).item() == 1e8 + 1  # float32 has no such number


def test_the_sum_has_the_same_bits_whatever_the_order_of_arrival():
    """DDP's buckets come in an order of their own, a resumed run's in another."""
    params = parameters(*range(1, 40))
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(p.shape, generator=g) * 10 ** float(i % 7) for i, p in enumerate(params)]
    found = set()
    for seed in range(5):
        norms = ModuleNorms({"all": params})
        for i in torch.randperm(len(params), generator=torch.Generator().manual_seed(seed)):
            norms.add([params[i]], [grads[i]])
        found.add(norms.total(torch.device("cpu")).item())
    assert len(found) == 1
