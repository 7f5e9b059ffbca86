import math
import pytest
import reference
import torch

from agvm_d2.modulator import Modulator
from agvm_d2.moments import pairwise_moments
from agvm_d2.rules import RULES
from agvm_d2.settings import Settings
from agvm_d2.variance import pairwise_variance

NAMES = ("backbone", "fpn", "head")


def make(names=NAMES, rule="variance", batch_size=None, base_batch_size=16, **options):
    """A Modulator by the built-in rules."""
    keys = {key: options.pop(key) for key in ("anchor", "ratio_range") if key in options}
    settings = Settings(rule=rule, base_batch_size=base_batch_size, **keys)
    return Modulator(names, RULES[rule](settings, names, batch_size), **options)


def moments(unit_sq, mean_sq, k=4):
    return pairwise_moments(
        torch.tensor(unit_sq, dtype=torch.float64), torch.tensor(mean_sq, dtype=torch.float64), k
    )


def test_averages_of_the_noise_scale_are_exact_in_float64():
    modulator = Modulator(["a"], lambda m: torch.ones(1, dtype=torch.float64), momentum=0.97)
    modulator.update(moments([2.0], [1.0]))
    assert modulator.unit_sq.tolist() == [1 - 0.97] * 2  # float32 has 0.029999999
    assert modulator.mean_sq.tolist() == [(1 - 0.97) * 0.5] * 2


def test_one_update_by_hand():
    # K = 2, S1 = 1: phi = 2 (1 - S2), so 1 and 0.25 and ratio 4; mu = 0.9 + 0.1 sqrt(4) = 1.1.
    modulator = make(NAMES[:2], momentum=0.9)
    modulator.update(moments([1.0, 1.0], [0.5, 0.875], k=2))
    assert modulator.variance.tolist() == [1.0, 0.25]
    assert modulator.factors.tolist() == pytest.approx([1.0, 1.1], rel=1e-6)


def test_updates_equal_reference():
    modulator = make(NAMES, anchor="fpn", momentum=0.97, ratio_range=(0.5, 10))
    wanted = dict.fromkeys(NAMES, 1.0)
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        mean = torch.rand(3, generator=g, dtype=torch.float64) ** 3
        modulator.update(pairwise_moments(torch.ones(3, dtype=torch.float64), mean, 4))
        phi = {n: pairwise_variance(1.0, float(m), 4) for n, m in zip(NAMES, mean)}
        wanted = reference.factors(wanted, phi, "fpn", 0.97, (0.5, 10))
    assert modulator.factors.tolist() == pytest.approx(list(wanted.values()))
    assert modulator.factors[1] == 1.0


@pytest.mark.parametrize(
    "bad", [(0.0, 0.0), (math.nan, math.nan), (math.inf, math.inf), (1.0, math.nan)]
)
def test_a_module_without_a_finite_variance_keeps_its_factor(bad):
    modulator = make(NAMES, momentum=0.5)
    modulator.update(moments([1.0] * 3, [0.5, 0.9, 0.9]))
    before = modulator.factors.clone()
    averages = modulator.unit_sq.clone(), modulator.mean_sq.clone()
    modulator.update(moments([1.0, 1.0, bad[0]], [0.5, 0.6, bad[1]]))
    assert modulator.factors[2] == before[2] and modulator.factors[1] != before[1]
    assert modulator.unit_sq[2] == averages[0][2] and modulator.mean_sq[2] == averages[1][2]
    assert modulator.factors.isfinite().all()


def test_a_rule_that_asks_for_nothing_finite_is_not_followed():
    asked = torch.tensor([math.inf, math.nan, 3.0], dtype=torch.float64)
    modulator = Modulator(NAMES, lambda moments: asked, momentum=0.5)
    modulator.update(moments([1.0] * 3, [0.5] * 3))
    assert modulator.factors.tolist() == [1, 1, 2]


def test_gain_is_approached_by_the_moving_average():
    names = ["backbone", "fpn", "rpn", "rest"]
    modulator = make(names, "gain", 16, 4, momentum=0.5)  # one of four units
    modulator.update(moments([1.0, 3.0, 3.0, 0.0], [1.0, 1.0, 2.0, 0.0]))
    assert modulator.factors.tolist() == [1, 2, 1.25, 1]  # half-way; nothing known of the last
    modulator.update(moments([1.0, 9.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]))
    assert modulator.factors.tolist() == [1, 3, 1.125, 1]  # fpn: bounded by K
    modulator.update(moments([math.nan, 1e9, 1.0, 1.0], [math.nan, 1e9, 1.0, 0.5]))
    # The anchor needs no gradient, and a huge one counts as any other.
    assert modulator.factors.tolist() == [1, 2, 1.0625, 1.5]


def test_without_the_anchor_s_variance_every_factor_holds():
    modulator = make(NAMES, momentum=0.5)
    modulator.update(moments([1.0] * 3, [0.5, 0.9, 0.9]))
    before = modulator.factors.tolist()
    modulator.update(moments([math.nan, 1.0, 1.0], [math.nan, 0.2, 0.3]))
    assert modulator.factors.tolist() == before


def test_when_it_measures():
    modulator = make(NAMES, interval=10, start_iter=5, stop_iter=30)
    assert [i for i in range(50) if modulator.due(i)] == [5, 15, 25]
    assert [i for i in range(50) if modulator.active(i)] == list(range(5, 30))
    assert make(NAMES, start_iter=5).due(10**6 + 5)
    never = make(NAMES, stop_iter=0)
    assert not never.due(0) and not never.active(0)


def test_state_survives_a_weights_only_checkpoint(tmp_path):
    old, new = make(NAMES), make(NAMES)
    old.update(moments([1.0] * 3, [0.5, 0.9, 0.2]))
    torch.save(old.state_dict(), tmp_path / "state.pth")
    new.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for key in ("factors", "unit_sq", "mean_sq"):
        assert torch.equal(getattr(new, key), getattr(old, key))
    assert new.num_units == 4


def test_state_of_other_modules_is_an_error():
    with pytest.raises(ValueError, match="backbone, fpn, head, but this model has backbone, head"):
        make(("backbone", "head")).load_state_dict(make(NAMES).state_dict())


def test_averages_of_another_number_of_units_start_anew():
    """S1 and S2 of 32 workers' gradients say nothing about two workers'; the factors stay."""
    before = make(NAMES[:2], momentum=0.5)
    for _ in range(3):
        before.update(moments([1.0, 1.0], [0.5, 0.25], k=32))
    after = make(NAMES[:2], momentum=0.5)
    after.load_state_dict(before.state_dict())
    after.update(moments([4.0, 4.0], [3.0, 2.0], k=2))
    # S2/S1 of each and of all together, at momentum 0.5.
    assert after.unit_sq.tolist() == [0.5] * 3 and after.mean_sq.tolist() == [0.375, 0.25, 0.3125]
    assert after.factors[1] != 1 and before.factors[1] != 1
