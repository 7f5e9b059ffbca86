import pytest
import torch
from toy import MODULES, ToyDetector, batch, loss

from agvm_d2 import AGVM, Settings, split_param_groups
from agvm_d2.moments import Moments, pairwise_moments
from agvm_d2.rules import RULES, gain_rule, variance_rule

NAMES = ("backbone", "fpn", "head")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def of_variance(*variance):
    """Moments of which only the variance is known."""
    return Moments(
        tensor(*variance) * torch.nan, tensor(*variance) * torch.nan, 2, tensor(*variance)
    )


def test_variance_is_the_root_of_the_anchors_over_the_modules():
    # 1e-6 beside each variance is too little to see.
    rule = variance_rule(Settings(), NAMES, None)
    assert rule(of_variance(0.8, 0.2, 0.05)).tolist() == pytest.approx([1, 2, 10**0.5], rel=1e-4)
    rule = variance_rule(Settings(anchor="head", ratio_range=(0.25, 4)), NAMES, None)
    assert rule(of_variance(0.8, 0.4, 0.2)).tolist() == pytest.approx([0.5, 0.5**0.5, 1], rel=1e-4)
    assert rule(of_variance(8.0, 0.01, 0.2)).tolist() == [0.5, 2, 1]


def test_the_anchor_must_be_a_module():
    with pytest.raises(ValueError, match="AGVM.ANCHOR: 'neck'.*modules are backbone, fpn, head"):
        variance_rule(Settings(anchor="neck"), NAMES, None)


def test_the_gain_needs_no_anchor_but_the_batch():
    gain_rule(Settings(), ("encoder", "decoder"), 32)
    with pytest.raises(ValueError, match="AGVM.ANCHOR: 'backbone' is not a module"):
        variance_rule(Settings(), ("encoder", "decoder"), 32)
    for batch_size in (None, 0):
        with pytest.raises(ValueError, match="AGVM.RULE gain needs batch_size"):
            gain_rule(Settings(), NAMES, batch_size)


@pytest.mark.parametrize("base_batch_size, gain", [(4, 4), (8, 2), (16, 1), (32, 0.5)])
def test_gain_from_a_batch_of_several_units(base_batch_size, gain):
    # Orthogonal gradients of four units, 4 images each: 4 times from one unit, twice from two.
    rule = gain_rule(Settings(base_batch_size=base_batch_size), NAMES[:1], 16)
    assert rule(pairwise_moments(tensor(1.0), tensor(0.25), 4)).tolist() == pytest.approx([gain])


def test_a_rule_of_ones_own(monkeypatch):
    """As rules.py says: a function, put into RULES."""

    def halves(settings, names, batch_size):
        assert (list(names), batch_size) == (list(MODULES), 8)
        return lambda moments: torch.full_like(moments.unit_sq, settings.base_batch_size / 32)

    with pytest.raises(ValueError, match="AGVM.RULE: found 'halves'"):
        Settings(rule="halves").check()
    monkeypatch.setitem(RULES, "halves", halves)
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.1), model)
    settings = Settings(rule="halves", momentum=0, start_iter=0)
    agvm = AGVM(model, optimizer, settings, micro_batches=2, batch_size=8)
    agvm.begin(0)
    for seed in (0, 1):
        (loss(model, batch(4, seed=seed)) / 2).backward()
        agvm.micro_batch_done(0.5)
    agvm.backward_done()
    optimizer.step()
    agvm.end()
    assert agvm.modulator.factors.tolist() == [0.5] * 4
