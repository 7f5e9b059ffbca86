"""docs/theory.md: its bounds, counter-examples and formulas, against runs and counts by hand."""

import math
import pytest
import torch
from torch import nn

from agvm_d2 import AGVM, Settings, split_param_groups
from agvm_d2.modulator import Modulator
from agvm_d2.moments import pairwise_moments
from agvm_d2.progress import Progress
from agvm_d2.rules import RULES
from agvm_d2.variance import lr_gain, lr_ratio, pairwise_variance
from benchmarks import theory

MODULES = (("backbone", "backbone"), ("head", "head"))
UNITS, SIZE = 4, 20  # micro-batches of an iteration; parameters of a module
LOW, HIGH = math.sqrt(0.5), math.sqrt(10)  # of a factor, by default
SMOOTH = 1.0  # L: the larger curvature below


class Quadratic(nn.Module):
    """sum h/2 |x|^2 + noise x over two modules, so that the gradient is h x + noise."""

    def __init__(self, curvature, start):
        super().__init__()
        self.curvature = curvature
        self.backbone = nn.Parameter(torch.full((SIZE,), start[0]))
        self.head = nn.Parameter(torch.full((SIZE,), start[1]))

    def forward(self, noise):
        pairs = zip((self.backbone, self.head), self.curvature, noise)
        return sum(h / 2 * x.square().sum() + e.dot(x) for x, h, e in pairs)

    def gradient_sq(self):
        """Of the loss without noise."""
        pairs = zip((self.backbone, self.head), self.curvature)
        return sum(h**2 * float(x.detach().square().sum()) for x, h in pairs)


def train(make_optimizer, curvature=(0.2, 1.0), start=(1.0, 1.0), noise=0.2, steps=300, **settings):
    """The real AGVM; |gradient|^2 before each step, and the modulator.

    noise: variance of each module's gradient of an iteration, sigma^2/B.
    """
    g = torch.Generator().manual_seed(0)
    model = Quadratic(curvature, start)
    optimizer = make_optimizer(model.parameters())
    split_param_groups(optimizer, model, modules=MODULES)
    settings = Settings(start_iter=0, modules=MODULES, **settings)
    agvm = AGVM(model, optimizer, settings, micro_batches=UNITS)
    squares = []
    for step in range(steps):
        squares.append(model.gradient_sq())
        agvm.begin(step)
        optimizer.zero_grad()
        for _ in range(UNITS):
            noises = torch.randn(2, SIZE, generator=g) * math.sqrt(noise * UNITS / SIZE)
            (model(noises) / UNITS).backward()
            agvm.micro_batch_done(1 / UNITS)
        agvm.backward_done()
        optimizer.step()
        agvm.end()
    return squares, agvm.modulator


def sgd(lr, momentum=0.0):
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum)


def bound(lr, noise, steps, start_loss, momentum=0.97, interval=10):
    """Theorem 1, with the default range of the factors."""
    kappa = (1 - momentum) * (HIGH - LOW) / 2
    low = LOW - 2 * kappa
    bias = (2 * kappa / low) ** 2 / interval
    return (
        4 * start_loss / (low * lr * steps)
        + (2 * SMOOTH * lr * HIGH**2 / low + bias) * noise  # of all modules
    )


# Section 1


@pytest.mark.parametrize("lr", [1 / HIGH, 0.1, 0.03])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mean_squared_gradient_is_below_the_bound_with_sgd(lr, momentum):
    """With momentum nothing is proven: the bound at the effective rate lr/(1 - momentum) holds."""
    squares, modulator = train(sgd(lr * (1 - momentum), momentum))
    limit = bound(lr, noise=2 * 0.2, steps=300, start_loss=SIZE * (0.2 + 1.0) / 2)
    assert squares[0] == pytest.approx(SIZE * (0.04 + 1.0))
    assert sum(squares) / len(squares) < limit < squares[0]  # it says something
    assert LOW <= float(modulator.factors.min()) <= float(modulator.factors.max()) <= HIGH


def test_the_constants_of_the_bound_by_hand():
    # kappa = 0.03 * 1.22759 = 0.036828, m - 2 kappa = 0.633451, (2 kappa/0.633451)^2/10 = 0.001352
    assert bound(lr=1.0, noise=0.0, steps=4, start_loss=0.633451) == pytest.approx(1, rel=1e-5)
    assert bound(1.0, 1.0, 1, 0.0) == pytest.approx(20 / 0.633451 + 0.001352, rel=1e-5)


def test_adamw_comes_to_rest_near_the_minimum():
    """Not proven: the squared gradient's mean over the last quarter is 1 % of the first."""
    squares, _ = train(lambda params: torch.optim.AdamW(params, lr=0.02), steps=400)
    assert sum(squares[-100:]) / 100 < 0.01 * squares[0]


def test_without_the_moving_average_a_rate_that_works_diverges():
    """lr h = 0.9. Far away a head is all signal, so its target is sqrt(10) and |1 - 0.9 sqrt(10)| =
    1.85 takes it further away; the average has moved 3 % of the way when the head has arrived."""
    far = {"curvature": (1.0, 1.0), "start": (0.0, 100.0), "steps": 200, "interval": 1}
    averaged, modulator = train(sgd(0.9), **far)
    assert sum(averaged[-100:]) / 100 < 10 * 0.2 and float(modulator.factors.max()) < 1.5
    assert not math.isfinite(train(sgd(0.9), momentum=0.0, **far)[0][-1])
    assert sum(train(sgd(0.9), mode="monitor", **far)[0][-100:]) / 100 < 10 * 0.2


@pytest.mark.parametrize("momentum", [0.0, 0.97])
def test_without_the_range_a_rate_that_works_diverges(momentum):
    """lr h = 0.1 is below 2/sqrt(10), where no factor of the range can do harm. A range of 1e-6 to
    1e6 allows 1,000. The average goes 3 % of the way in the first step, and |1 - 0.1 * 31| > 2."""
    far = {"curvature": (1.0, 1.0), "start": (0.0, 100.0), "steps": 200, "interval": 1}
    squares = train(sgd(0.1), momentum=momentum, **far)[0]
    assert sum(squares[-100:]) / 100 < 10 * 0.2
    wide = train(sgd(0.1), momentum=momentum, ratio_range=(1e-6, 1e6), **far)[0]
    assert not math.isfinite(wide[-1])


def drift(values, probabilities):
    """E[target * gradient] of two gradients at a point where the true one is 0; anchor's phi: 1."""
    total = 0.0
    for u, p in zip(values, probabilities):
        for v, q in zip(values, probabilities):
            phi = pairwise_variance((u * u + v * v) / 2, ((u + v) / 2) ** 2, 2)
            total += p * q * math.sqrt(lr_ratio(phi, 1.0)) * (u + v) / 2
    return total


def test_a_measurement_of_the_applied_gradient_is_biased_by_skewed_noise_only():
    # Both 2 (1/9) or both -1 (4/9): phi = 0, sqrt(10). One of each (4/9): phi = 1.8, sqrt(1/1.8).
    by_hand = (2 / 9 - 4 / 9) * math.sqrt(10) + 4 / 9 * 0.5 / math.sqrt(1.8)
    assert drift([2.0, -1.0], [1 / 3, 2 / 3]) == pytest.approx(by_hand, abs=1e-5)
    assert drift([3.0, 1.0, -1.0, -3.0], [0.2, 0.3, 0.3, 0.2]) == pytest.approx(0, abs=1e-12)


def test_the_average_of_independent_targets_has_a_share_of_their_variance():
    """(1 - a)/(1 + a), 0.0152 of it at 0.97."""
    g = torch.Generator().manual_seed(0)
    targets = 1 + 0.5 * torch.randn(4000, 500, generator=g, dtype=torch.float64)  # runs abreast
    modulator = Modulator([str(i) for i in range(500)], lambda moments: targets[moments.num_units])
    for step in range(300):
        modulator.update(pairwise_moments(torch.ones(500), torch.ones(500), step + 2))
    assert float(modulator.factors.var()) == pytest.approx(0.25 * 0.03 / 1.97, rel=0.3)


# Section 2


@pytest.mark.parametrize("signal, noise", [(1.0, 0.01), (1.0, 1.0), (0.01, 1.0)])
def test_a_step_with_the_gain_has_the_gain_times_the_guaranteed_descent(signal, noise):
    """signal: |G|^2; noise: the variance at the base batch, of which a batch 8 times larger has an
    eighth."""
    gain = lr_gain(*theory.expected_moments(signal, noise / 8), theory.UNITS, theory.UNITS / 8)
    assert gain == pytest.approx((signal + noise) / (signal + noise / 8))

    def descent(rate, noise):
        return rate * signal - SMOOTH * rate**2 / 2 * (signal + noise)

    assert descent(0.3 * gain, noise / 8) == pytest.approx(gain * descent(0.3, noise))


def test_the_models_gain_lies_between_the_modules():
    unit_sq, mean_sq = torch.tensor([8.0, 2.0]), torch.tensor([1.5, 1.5])
    gains = lr_gain(unit_sq, mean_sq, 8)
    model = lr_gain(unit_sq.sum(), mean_sq.sum(), 8)
    assert gains.min() < model < gains.max()
    assert model == pytest.approx(float((gains * mean_sq).sum() / mean_sq.sum()))


def test_by_the_smallest_gain_each_module_has_its_base_steps():
    """Gains of 8/3, 8/5 and 2, in turn; by the model's gain the slowest module has too few."""
    progress = Progress(modules=3, base_share=1 / 8, momentum=0.0)
    mean_sq = torch.tensor([3.0, 5.0, 4.0], dtype=torch.float64)
    made = torch.zeros(4, dtype=torch.float64)
    while progress.iterations < 100:
        progress.update(pairwise_moments(torch.full((3,), 8.0), mean_sq, 8))
        progress.begin()
        progress.count(raised=True)
        made, mean_sq = made + progress.gains, mean_sq.roll(1)
    assert made[:3].min() >= 100 and progress.iterations == pytest.approx(8 / 5 * 63)
    progress = Progress(modules=3, base_share=1 / 8, momentum=0.0)
    progress.update(pairwise_moments(torch.full((3,), 8.0), mean_sq, 8))
    assert 100 / progress.gains[-1] * progress.gain == pytest.approx(80)  # 24/12 for the model


def test_the_gain_weighted_mean_squared_gradient_is_below_the_base_bound():
    """Theorem 2, on a quadratic, in exact arithmetic: 100 steps' worth at 16 times the batch."""
    curvature, square = 1.0, torch.tensor(20.0)
    lr, noise, worth = 0.3, 0.5, 100
    start_loss = float(curvature * square / 2)
    total = clock = steps = 0.0
    while clock < worth:
        signal = float(curvature**2 * square)
        gain = lr_gain(
            *theory.expected_moments(signal, noise / 16), theory.UNITS, theory.UNITS / 16
        )
        total, clock, steps = total + gain * signal, clock + gain, steps + 1
        square = theory.next_square(square, torch.tensor(lr * gain), curvature, noise / 16)
    limit = 2 * start_loss / (lr * worth) + SMOOTH * lr * noise * (1 + 16 / worth)
    assert total / worth < limit
    assert steps < worth / 2  # at 16 times the batch


# Section 3


def simulate(rate, curvature, noise, square, steps, runs=20_000):
    """Mean and standard error of (h/2) x^2 over runs of one direction."""
    g = torch.Generator().manual_seed(0)
    x = torch.full((runs,), math.sqrt(square), dtype=torch.float64)
    for _ in range(steps):
        draws = torch.randn(runs, generator=g, dtype=torch.float64) * math.sqrt(noise)
        x = x - rate * (curvature * x + draws)
    loss = curvature / 2 * x.square()
    return float(loss.mean()), float(loss.std()) / math.sqrt(runs)


@pytest.mark.parametrize("rate, curvature, noise", [(0.1, 1.0, 0.5), (0.5, 2.0, 0.1), (0.9, 2, 1)])
def test_loss_of_a_module_is_the_simulated_one(rate, curvature, noise):
    square = 2.0
    for steps in (3, 10, 200):
        found, error = simulate(rate, curvature, noise, square, steps)
        expected = theory.loss_after(steps, curvature / 2 * square, rate, curvature, noise)
        assert abs(found - expected) < 6 * error
        recursion = torch.tensor(square, dtype=torch.float64)
        for _ in range(steps):
            recursion = theory.next_square(recursion, rate, curvature, noise)
        assert curvature / 2 * float(recursion) == pytest.approx(expected)
    assert theory.steady_loss(rate, curvature, noise) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("units", [2, 3, 8])
def test_phi_and_gain_in_terms_of_the_noise_scale(units):
    """nu: noise scale over batch. At nu = 1, phi is 2/3, and the gain at 4 times the batch 5/2."""
    moments = theory.expected_moments(0.7, 0.7, units)
    assert pairwise_variance(*moments, units) == pytest.approx(2 / 3)
    assert lr_gain(*moments, units, units / 4) == pytest.approx(5 / 2)
    nu = 0.3
    moments = theory.expected_moments(2.0, 2.0 * nu, units)
    assert pairwise_variance(*moments, units) == pytest.approx(2 * nu / (1 + 2 * nu))
    assert lr_gain(*moments, units, units / 4) == pytest.approx((1 + 4 * nu) / (1 + nu))


def test_expected_moments_are_the_simulated_ones():
    g = torch.Generator().manual_seed(0)
    units, noise = 4, 0.5
    draws = torch.randn(5000, units, SIZE, generator=g, dtype=torch.float64)
    gradients = 0.2 + draws * math.sqrt(noise * units / SIZE)
    unit_sq = float(gradients.square().sum(-1).mean())
    mean_sq = float(gradients.mean(1).square().sum(-1).mean())
    expected = theory.expected_moments(SIZE * 0.04, noise, units)
    assert (unit_sq, mean_sq) == pytest.approx(expected, rel=0.03)


def test_the_gain_is_the_ratio_of_the_best_rates_for_one_step():
    """1/(h (1 + nu)), found by trying; 16 times the batch."""
    curvature, square, noise = 2.0, 0.3, 5.0
    rates = torch.linspace(0, 1 / curvature, 100_001, dtype=torch.float64)
    best = [
        float(rates[theory.next_square(square, rates, curvature, n).argmin()])
        for n in (noise, noise / 16)
    ]
    signal = curvature**2 * square
    assert best[1] == pytest.approx(1 / (curvature * (1 + noise / 16 / signal)), abs=1e-5)
    gain = lr_gain(*theory.expected_moments(signal, noise / 16), theory.UNITS, theory.UNITS / 16)
    assert best[1] / best[0] == pytest.approx(gain, rel=1e-3)


@pytest.mark.parametrize("noise", [0.01, 10.0])
def test_in_equilibrium_phi_depends_on_rate_times_curvature_alone(noise):
    rate, curvature = 0.5, 2.0  # y = 1
    signal = 2 * curvature * theory.steady_loss(rate, curvature, noise)
    moments = theory.expected_moments(signal, noise)
    assert pairwise_variance(*moments, theory.UNITS) == pytest.approx(2 / 3)  # (4 - 2y)/(4 - y)
    gain = lr_gain(*moments, theory.UNITS, theory.UNITS / 16)
    assert gain == pytest.approx(16 - 15 / 2)  # k - y (k - 1)/2


def equilibrium(rate, rule, base=1.0):
    """Factor and loss of a module of curvature 1 after long training, beside an all but flat
    anchor; near the minimum from the start."""
    curvature = torch.tensor([[1e-9], [1.0]], dtype=torch.float64)
    noise = torch.full_like(curvature, 0.1)
    square = torch.tensor([[0.0], [0.1]], dtype=torch.float64)
    lrs = torch.tensor([rate], dtype=torch.float64)
    options = {"steps": 6000, "base": base, "decay": False}
    loss, factors = theory.train(curvature, noise, square, lrs, rule, **options)
    return float(factors[0, 1]), float(loss[0, 1])


def test_agvm_has_an_equilibrium_up_to_095_of_the_rate_and_none_above():
    """y^2 - 7y + 8 = 0: y = 1.4384, and lr h = y sqrt((4 - 2y)/(4 - y)) = 0.9524."""
    y = (7 - math.sqrt(17)) / 2
    assert y * math.sqrt((4 - 2 * y) / (4 - y)) == pytest.approx(0.9524, abs=1e-4)
    factor, _ = equilibrium(0.9, "variance")
    y = 0.9 * factor
    assert factor == pytest.approx(math.sqrt((4 - y) / (4 - 2 * y)), abs=1e-4)
    assert equilibrium(1.0, "variance")[1] > 1e30
    assert equilibrium(1.0, None)[1] == pytest.approx(theory.steady_loss(1.0, 1.0, 0.1))


@pytest.mark.parametrize("rate", [0.3, 1.0, 1.9])
def test_the_gain_keeps_a_rate_stable_that_is_so_at_the_base_batch(rate):
    """y = y0 k/(1 + y0 (k - 1)/2), below 2 as y0 is; k = 16."""
    factor, loss = equilibrium(rate, "gain", base=1 / 16)
    y = 16 * rate / (1 + rate * 15 / 2)
    assert rate * factor == pytest.approx(y, rel=1e-3) and y < 2
    assert loss == pytest.approx(theory.steady_loss(y, 1.0, 0.1), rel=1e-2)


def test_the_figures_factors_are_the_modulators():
    curvature, noise, square = theory.two_modules(torch.tensor(4.0), torch.tensor(9.0))
    settings, lr = Settings(), torch.tensor([0.1], dtype=torch.float64)
    rule = RULES["variance"](settings, ["backbone", "head"], None)
    modulator = Modulator(["backbone", "head"], rule)
    now = square
    for step in range(25):
        if modulator.due(step):
            moments = theory.expected_moments((curvature**2 * now).sum(-1), noise.sum(-1))
            modulator.update(pairwise_moments(*moments, theory.UNITS))
        now = theory.next_square(now, (lr * modulator.factors)[:, None], curvature, noise)
    loss, factors = theory.train(curvature, noise, square, lr, "variance", 25, decay=False)
    assert factors[0].tolist() == pytest.approx(modulator.factors.tolist())
    assert loss[0].tolist() == pytest.approx(((curvature * now).sum(-1) / 2).tolist())


def test_with_unequal_noise_agvm_is_ahead_and_all_are_near_two_best_rates():
    one, ratio = torch.tensor(1.0), torch.tensor(0.01)
    goal = theory.ideal(ratio, one)
    losses = {rule: float(theory.best(rule, ratio, one) / goal) for rule in theory.METHODS}
    assert 1 < losses["variance"] < losses[None] < 1.15
    assert losses[None] < losses["model gain"] < losses["gain"] < 1.5
    short = [float(theory.best(rule, ratio, one, steps=300)) for rule in ("variance", None)]
    assert 0.92 < short[0] / short[1] < 0.95


@pytest.mark.parametrize("noise", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("steps", [300, 1000])
def test_with_unequal_curvature_the_gain_of_each_module_is_ahead(noise, steps):
    one, ratio = torch.tensor(1.0), torch.tensor(100.0)
    losses = {rule: float(theory.best(rule, one, ratio, noise, steps)) for rule in theory.METHODS}
    assert losses["gain"] < min(losses[None], losses["model gain"]) < losses["variance"]


@pytest.mark.parametrize("curvature_ratio", [1.0, 10.0])
def test_only_the_batch_changes_and_the_gains_loss_stays(curvature_ratio):
    for batch in (4, 16):
        steps, gained, _ = theory.only_the_batch(batch, curvature_ratio)
        assert steps < 900 and gained < 1  # of 1,000 at the base batch, and of its loss
