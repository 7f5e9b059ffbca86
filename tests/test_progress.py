"""Progress by hand, and which LR schedulers can follow it."""

import math
import warnings
import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers

from agvm_d2.moments import pairwise_moments
from agvm_d2.progress import Progress, check_scheduler, fit_scheduler, set_position


def moments(unit_sq, mean_sq, k=4):
    tensors = (torch.tensor(s, dtype=torch.float64) for s in (unit_sq, mean_sq))
    return pairwise_moments(*tensors, k)


def test_a_step_counts_as_the_smallest_modules_gain():
    # Four units, of which one is a base batch: E|g|^2 there is S1, so the gain is S1/S2. First
    # module all noise (4), second 4/2; S1 = 8, S2 = 3 together: the model's gain is 8/3.
    progress = Progress(modules=2, base_share=1 / 4, momentum=0.0)
    progress.update(moments([4.0, 4.0], [1.0, 2.0]))
    assert progress.gains.tolist() == pytest.approx([4.0, 2.0, 8 / 3])
    assert progress.gain == pytest.approx(2.0)
    progress.begin()
    progress.count(raised=True)
    progress.begin()
    progress.count(raised=False)
    progress.begin()
    progress.count(raised=False, possible=False)
    assert progress.iterations == pytest.approx(2 + 2)
    assert progress.possible == pytest.approx(4 + 1)


def test_a_module_without_a_gradient_does_not_hold_training_up():
    progress = Progress(modules=2, base_share=1 / 4, momentum=0.0)
    progress.update(moments([4.0, 0.0], [1.0, 0.0]))  # such as a head without objects to learn from
    assert progress.gains.tolist() == [4.0, 1.0, 4.0] and progress.gain == 4.0
    again = Progress(modules=2, base_share=1 / 4, momentum=0.0)
    again.load_state_dict(progress.state_dict())
    assert again.gain == 4.0
    progress.update(moments([4.0, 4.0], [1.0, 2.0]))
    assert progress.gain == 2.0
    progress.update(moments([0.0, 0.0], [0.0, 0.0]))  # Adam's, over no second moments yet
    assert progress.gain == 1.0


def test_a_state_from_before_the_smallest_gain_counted():
    progress = Progress(modules=2, base_share=1 / 4, momentum=0.0)
    progress.update(moments([4.0, 4.0], [1.0, 2.0]))
    state = progress.state_dict()
    del state["silent"]
    again = Progress(modules=2, base_share=1 / 4, momentum=0.0)
    again.load_state_dict(state)
    assert again.gain == 2.0


def test_the_gains_average_starts_at_one():
    progress = Progress(modules=1, base_share=1 / 4, momentum=0.75)
    for wanted in (1.75, 2.3125):  # 0.75 + 0.25 x 4; 0.75 x 1.75 + 1
        progress.update(moments([4.0], [1.0]))
        assert progress.gain == pytest.approx(wanted)


@pytest.mark.parametrize(
    "unit_sq, mean_sq, low, high",
    [([4.0], [1e-30], 4, 4), ([1e30], [1.0], 4, 4), ([1.0], [1.0], 1, 1), ([1.0], [2.0], 1, 1)],
)
def test_one_measurement_cannot_pass_the_ratio_of_the_batches(unit_sq, mean_sq, low, high):
    progress = Progress(modules=1, base_share=1 / 4, momentum=0.0)
    progress.update(moments(unit_sq, mean_sq))
    assert low <= progress.gain <= high


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_what_is_not_finite_changes_nothing(bad):
    progress = Progress(modules=2, base_share=1 / 4, momentum=0.5)
    progress.update(moments([4.0, 4.0], [1.0, 4.0]))
    before = progress.gains.clone()
    progress.update(moments([4.0, bad], [1.0, bad]))
    assert progress.gains[1] == before[1] and progress.gains[0] != before[0]
    assert progress.gains.isfinite().all()
    assert (progress.gains[-1] == before[-1]) == (bad != 0)  # one without gradients adds nothing
    assert progress.gain == (progress.gains[0] if bad == 0 else before[1])


def test_at_the_base_batch_a_step_is_a_step():
    progress = Progress(modules=1, base_share=1.0, momentum=0.5)
    for mean_sq in (0.01, 0.5, 1.0):
        progress.update(moments([1.0], [mean_sq]))
        progress.begin()
        progress.count(raised=True)
    assert progress.iterations == 3


def test_its_state_goes_on_and_with_another_ratio_at_gains_of_one():
    progress = Progress(modules=1, base_share=1 / 4, momentum=0.5)
    progress.update(moments([4.0], [1.0]))
    progress.begin()
    progress.count(raised=True)
    same, other = Progress(1, 1 / 4, 0.5), Progress(1, 1 / 2, 0.5)
    for new in (same, other):
        new.load_state_dict(progress.state_dict())
        assert new.iterations == progress.iterations == 2.5
    assert same.gain == 2.5 and other.gain == 1


# LR schedulers


def optimizer():
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [params[0]], "lr": 1.0}, {"params": [params[1]], "lr": 2.0}]
    return torch.optim.SGD(groups, lr=1.0)


def test_the_rates_are_those_after_so_many_steps():
    sgd = optimizer()
    scheduler = torch_schedulers.LambdaLR(sgd, lambda position: 1 - position / 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_scheduler(scheduler)
        set_position(scheduler, 2.5)
    assert [group["lr"] for group in sgd.param_groups] == [0.75, 1.5]
    assert scheduler.get_last_lr() == [0.75, 1.5] and scheduler.last_epoch == 2.5
    fit_scheduler(scheduler, 4)  # of a checkpoint with progress
    assert [group["lr"] for group in sgd.param_groups] == [0.6, 1.2]
    assert scheduler.last_epoch == 4 and isinstance(scheduler.last_epoch, int)
    scheduler.base_lrs = [5.0]  # of one without split groups
    fit_scheduler(scheduler, 4)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 1.0]


class CountsItself(torch_schedulers.LRScheduler):
    def __init__(self, optimizer):
        self.steps = -1
        super().__init__(optimizer)

    def step(self, epoch=None):
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1.0 if self.steps < 30 else 0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch_schedulers.StepLR(o, 3),
        lambda o: torch_schedulers.MultiStepLR(o, [3, 5]),
        lambda o: torch_schedulers.ExponentialLR(o, 0.9),
        lambda o: torch_schedulers.CosineAnnealingLR(o, 10),
        lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 10),
        lambda o: torch_schedulers.LambdaLR(o, lambda i: [1.0, 0.5, 0.1][i]),
        lambda o: torch_schedulers.ReduceLROnPlateau(o),
        lambda o: torch_schedulers.SequentialLR(
            o, [torch_schedulers.ConstantLR(o), torch_schedulers.ExponentialLR(o, 0.9)], [3]
        ),
        # Flat at first.
        lambda o: torch_schedulers.SequentialLR(
            o, [torch_schedulers.LambdaLR(o, lambda i: 1.0), torch_schedulers.LinearLR(o)], [30]
        ),
        lambda o: torch_schedulers.ChainedScheduler(
            [torch_schedulers.LambdaLR(o, lambda i: 1.0 if i < 30 else 0.1)]
        ),
        lambda o: CountsItself(o),
    ],
)
def test_a_scheduler_that_counts_one_by_one_is_refused_and_left_alone(make):
    sgd = optimizer()
    scheduler = make(sgd)
    before = [group["lr"] for group in sgd.param_groups], dict(vars(scheduler))
    with pytest.raises(ValueError, match=f"AGVM.SCHEDULE gain: .* {type(scheduler).__name__}"):
        check_scheduler(scheduler)
    assert ([group["lr"] for group in sgd.param_groups], dict(vars(scheduler))) == before


def test_an_object_that_is_no_scheduler_of_torchs():
    class Duck:
        def step(self):
            pass

    with pytest.raises(ValueError, match="AGVM.SCHEDULE gain: the LR scheduler Duck"):
        check_scheduler(Duck())


def test_an_iteration_counts_once_and_places_its_schedulers():
    sgd = optimizer()
    scheduler = torch_schedulers.LambdaLR(sgd, lambda position: 1 - position / 10)
    progress = Progress(modules=1, base_share=1 / 4, momentum=0.0, max_iter=10)
    progress.update(moments([4.0], [1.0]))
    progress.follow(scheduler)
    lrs = []
    for steps in ([True], [True, True], [], [True]):
        progress.begin()
        for raised in steps:
            progress.count(raised)
        scheduler.step()  # before the iteration ends, as in Detectron2
        progress.count(raised=False)
        assert scheduler.last_epoch == pytest.approx(min(progress.iterations, 10), abs=1e-3)
        lrs.append(sgd.param_groups[0]["lr"])
    assert progress.iterations == 4 + 4 + 1 + 4
    assert lrs == pytest.approx([0.6, 0.2, 0.1, 1e-5])  # and not beyond its end
    progress.restart()
    assert progress.iterations == progress.possible == 0 and progress.gain == 4
