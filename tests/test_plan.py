"""The plan, from noise scales written by hand."""

import json
import re
import numpy as np
import pytest
from detectron2.config import LazyConfig
from helpers import VITDET

from agvm_d2 import plan
from agvm_d2.d2 import lazy
from agvm_d2.variance import gain_of


def measured(*modules, iterations=16_000, base=16):
    """Of a run whose modules have these noise scales in images, at even shares of training; the
    whole model's is not used."""
    share = np.linspace(0, 1, len(modules[0]))
    noise = {f"m{i}": (share, np.array(images, dtype=float)) for i, images in enumerate(modules)}
    return plan.Measured(base, iterations, {**noise, "model": (share, np.full(len(share), 1e9))})


@pytest.mark.parametrize("noise, gain", [(1e-6, 1), (48, 16 / 7), (1e9, 4), (np.inf, 4)])
def test_one_noise_scale_gives_one_gain(noise, gain):
    # (1 + 48/16)/(1 + 48/64) = 16/7; all signal 1; all noise 64/16.
    assert gain_of(1 / noise, 16, 64) == pytest.approx(gain)
    row = plan.predict(measured([noise]), 64)
    # The gain's average starts at 1: each of the first measurements is late by 5 iterations x
    # 0.9/(1 - 0.9) of them, so 45 (gain - 1) of progress is missing.
    assert row.iterations == pytest.approx((16_000 + 45 * (gain - 1)) / gain, abs=3)
    assert row.images == 64 * row.iterations


def test_the_noise_of_each_part_counts_there():
    # Signal in the first half, noise in the second: 8,000 + 8,000 / 4.
    noise = [1e-6] * 5001 + [1e9] * 5000
    assert plan.predict(measured(noise), 64).iterations == pytest.approx(10_000, rel=0.01)


def test_the_least_noisy_modules_gain_is_the_clock():
    # First one of two is all signal, then the other: no step is worth more than one.
    one, other = [1e-6] * 5 + [1e9] * 5, [np.inf] * 5 + [1e-6] * 5
    assert plan.predict(measured(one, other), 64).iterations == 16_000
    # Of a noise scale of 48 and one that drowns the gradient, 48's: 2.29 instead of 4.
    both, alone = measured([48], [np.inf]), measured([48])
    assert plan.predict(both, 64) == plan.predict(alone, 64)
    assert plan.coverage(measured([48] * 4, [60, 60, 60, 10])).endswith(
        "The smallest gain counts: 75 % of it m0's."
    )


def test_the_base_batch_takes_its_own_iterations():
    assert plan.predict(measured([48]), 16) == (16, 16_000, 256_000)


def test_where_twice_the_batch_saves_nothing():
    # (1 + 48/16)/(1 + 48/batch): 2.29 at 64 and 2.91 at twice that; 3.37 at 256 and 3.66 at 512.
    lines = plan.table(
        measured([48]), [plan.predict(measured([48]), b) for b in (64, 256, 512)], [1], None
    ).splitlines()
    assert [("hardly" in line) for line in lines] == [False, False, True, False]


def test_hours(capsys):
    text = plan.table(measured([1e9]), [plan.Row(64, 4_000, 256_000)], [8, 128], 10.0)
    head, line = (re.split(r" {2,}", t.strip()) for t in text.splitlines())
    # 256,000 images / 10 per second = 7.11 hours of one GPU; 128 GPUs have no image each.
    assert dict(zip(head, line)) == {
        "batch": "64",
        "iterations": "4,000",
        "fewer": "4.0x",
        "images": "256,000",
        "efficiency": "100 %",
        "hours on 8": "0.89",
        "hours on 128": "-",
        "GPU-hours": "7.11",
    }


def write(folder, config, rows):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


YAML = """
SOLVER: {{IMS_PER_BATCH: {batch}, MAX_ITER: {max_iter}, STEPS: !!python/tuple [1, 2]}}
AGVM: {{MODE: {mode}, RULE: {rule}, SCHEDULE: {schedule}, BASE_BATCH_SIZE: 16}}
"""
ROWS = [
    {"iteration": i, "agvm/noise_scale/model": 10.0 * p, "agvm/noise_scale/fpn": 5.0, **more}
    for i, p, more in ((100, 1, {"agvm/progress": 200.0}), (300, 2, {"agvm/progress": 800.0}))
]


@pytest.mark.parametrize(
    "mode, rule, schedule, asked, base, iterations, share",
    [
        # A monitored run at its own batch, of 1,000 iterations.
        ("monitor", "variance", "iterations", None, 64, 1000, [0.1, 0.3]),
        # As many images as 64 x 1,000, at 16; the schedule was that of iterations.
        ("modulate", "gain", "iterations", None, 16, 4000, [0.1, 0.3]),
        ("modulate", "variance", "iterations", 32, 32, 2000, [0.1, 0.3]),
        # MAX_ITER is the base batch's; the learning rate's schedule was that of iterations.
        ("monitor", "gain", "gain", None, 16, 1000, [0.1, 0.3]),
        # The schedule was that of progress.
        ("modulate", "gain", "gain", None, 16, 1000, [0.2, 0.8]),
        ("modulate", "gain", "gain", 32, 32, 500, [0.2, 0.8]),
    ],
)
def test_what_a_run_says(mode, rule, schedule, asked, base, iterations, share, tmp_path):
    text = YAML.format(batch=64, max_iter=1000, mode=mode, rule=rule, schedule=schedule)
    found = plan.read_run(write(tmp_path, text, ROWS), asked)
    assert (found.base, found.iterations) == (base, iterations)
    assert found.noise["model"][0].tolist() == share
    assert found.noise["model"][1].tolist() == [10, 20] and found.noise["fpn"][1][0] == 5


@pytest.mark.parametrize("schedule", ["gain", "iterations"])
def test_a_batch_below_the_base_is_the_runs_own(schedule, tmp_path):
    """Monitored with AGVM.BASE_BATCH_SIZE left at its 16: MAX_ITER is this batch's."""
    text = YAML.format(batch=4, max_iter=1000, mode="monitor", rule="gain", schedule=schedule)
    folder = write(tmp_path, text, ROWS)
    assert plan.read_run(folder)[:2] == (4, 1000)
    assert plan.read_run(folder, 8)[:2] == (8, 500)


def test_a_measurement_without_a_noise_scale_was_all_noise(tmp_path):
    text = YAML.format(batch=16, max_iter=1000, mode="monitor", rule="variance", schedule="x")
    rows = [{"iteration": 200, "agvm/progress": 1.0}, {"iteration": 400, "total_loss": 1.0}]
    rows += [{"iteration": 900, "agvm/progress": 1.0, "agvm/noise_scale/model": float("nan")}]
    share, images = plan.read_run(write(tmp_path, text, [*ROWS, *rows])).noise["model"]
    assert share.tolist() == [0.1, 0.2, 0.3, 0.9]
    assert images.tolist() == [10, np.inf, 20, np.inf]


@pytest.mark.parametrize(
    "rule, keys, averaging",
    [
        ("gain", "INTERVAL: 10, MOMENTUM: 0.97", (10, 0.97)),  # its own
        ("gain", "INTERVAL: -1", (5, 0.9)),
        ("variance", "INTERVAL: 10, MOMENTUM: 0.97", (5, 0.9)),  # what the gain will have
    ],
)
def test_the_plan_is_for_the_average_that_training_will_have(rule, keys, averaging, tmp_path):
    text = YAML.format(batch=64, max_iter=1000, mode="monitor", rule=rule, schedule="x")
    found = plan.read_run(write(tmp_path, text.replace("MODE:", f"{keys}, MODE:"), ROWS))
    assert found.averaging == averaging


def test_one_measurement_of_no_noise_at_all_is_one_of_many():
    with_one, without = measured([60.0] * 50 + [0.0] + [60.0] * 50), measured([60.0] * 101)
    found, wanted = (plan.predict(m, 64).iterations for m in (with_one, without))
    assert wanted < found < 1.03 * wanted


def test_a_slower_average_takes_longer():
    noise = measured([1e9])  # a gain of 4
    slow = noise._replace(averaging=(10, 0.97))
    # 16,000 / 4, and late by 10 x 0.97/0.03 measurements x 3/4 instead of 5 x 0.9/0.1.
    assert plan.predict(slow, 64).iterations == pytest.approx(4000 + 323 * 3 / 4, abs=5)
    assert plan.predict(noise, 64).iterations == pytest.approx(4000 + 45 * 3 / 4, abs=5)


@pytest.mark.parametrize("share, little", [([0.05, 0.98], False), ([0.35, 0.45], True)])
def test_how_much_was_measured_is_said(share, little):
    noise = (np.array(share), np.array([10.0, 20.0]))
    said = plan.coverage(plan.Measured(16, 1000, {"rpn": noise, "model": noise}))
    assert f"from {100 * share[0]:.0f} to {100 * share[1]:.0f} % of training" in said
    assert ("That is little" in said) == little


def test_a_lazyconfigs_run(tmp_path):
    cfg = lazy.load(VITDET, ["train.max_iter=500", "agvm.mode=monitor"])
    folder = write(tmp_path, "", ROWS)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    found = plan.read_run(folder)
    assert (found.base, found.iterations) == (cfg.dataloader.train.total_batch_size, 500)


def test_the_command(capsys, tmp_path):
    text = YAML.format(batch=16, max_iter=1000, mode="monitor", rule="variance", schedule="x")
    folder = write(tmp_path / "run", text, ROWS)
    plan.main([folder, "--batches", "64", "32", "--gpus", "4", "--images-per-second", "20"])
    out = capsys.readouterr().out
    assert "Base: batch 16, 1,000 iterations, 16,000 images" in out
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["32", "64"]
    assert plan.LIMITS in out and plan.HOURS in out and "That is little" in out
    assert (tmp_path / "run" / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "args, message",
    [
        (["no", "--batches", "64"], "'no/config.yaml' is not there"),
        (["run", "--batches", "8"], "--batches: 8 is below the base batch, 16"),
        (["run", "--batches", "0"], "--batches: found"),
        (["run", "--batches", "64", "--base-batch", "0"], "--base-batch: found [0]"),
        (["run", "--batches", "99999999", "--base-batch", "99999999"], "is too large for a run"),
        (["run", "--batches", "64", "--images-per-second", "0"], "--images-per-second: found"),
        (["run", "--batches", "64", "--gpus", "8"], "--gpus: hours on so many need --images-per"),
        (
            ["short", "--batches", "64"],
            "goes to iteration 300, but config.yaml has SOLVER.MAX_ITER",
        ),
        (["run", "--batches", "64", "--gpus", "-1"], "--gpus: found"),
        (["run", "--batches", "64", "--images-per-second", "-1"], "--images-per-second: found"),
        (["empty", "--batches", "64"], "has no agvm/noise_scale/model"),
        (
            ["keyless", "--batches", "64"],
            "SOLVER.IMS_PER_BATCH (dataloader.train.total_batch_size): found None",
        ),
        (["zero", "--batches", "64"], "SOLVER.MAX_ITER (train.max_iter): found 0"),
        (["old", "--batches", "64"], "has no agvm/progress"),
    ],
)
def test_bad_arguments(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = YAML.format(batch=16, max_iter=1000, mode="monitor", rule="variance", schedule="x")
    write(tmp_path / "run", text, ROWS)
    write(tmp_path / "empty", text, [{"iteration": 1, "total_loss": 1.0}])
    write(tmp_path / "keyless", "SOLVER: {MAX_ITER: 3}", ROWS)
    write(tmp_path / "zero", text.replace("MAX_ITER: 1000", "MAX_ITER: 0"), ROWS)
    write(tmp_path / "short", text.replace("MAX_ITER: 1000", "MAX_ITER: 270"), ROWS)
    write(tmp_path / "old", text, [{"iteration": 1, "agvm/noise_scale/model": 3.0}])
    with pytest.raises(SystemExit, match=re.escape(message)):
        plan.main(args)
