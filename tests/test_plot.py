import json
import math
import numpy as np
import pytest
from detectron2.config import LazyConfig
from helpers import VITDET

from agvm_d2 import plot as module
from agvm_d2.plot import drops_of, main, plot, read_config, read_metrics, smooth


def write(folder, rows):
    (folder / "metrics.json").write_text("".join(json.dumps(r) + "\n" for r in rows))


def rows(start=0, stop=100, modules=("backbone", "fpn", "my_module"), factor=1.1):
    return [
        {
            "iteration": i,
            "lr": 0.1,
            "total_loss": 2.0 / (i + 1),
            "loss_cls": 1.0 / (i + 1),
            **{f"agvm/variance/{m}": 0.5 for m in modules},
            **{f"agvm/lr_scale/{m}": factor for m in modules},
        }
        for i in range(start, stop, 20)
    ]


def test_draws_a_picture_of_any_modules(tmp_path):
    write(tmp_path, rows())
    main([str(tmp_path)])
    picture = (tmp_path / "agvm.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_elsewhere(tmp_path):
    write(tmp_path, rows())
    assert plot(str(tmp_path), str(tmp_path / "other.png")) == str(tmp_path / "other.png")
    assert not (tmp_path / "agvm.png").exists()


def test_where_a_resumed_run_wrote_twice_the_last_value_holds(tmp_path):
    write(tmp_path, rows() + rows(start=40, factor=1.5))
    iterations, values = read_metrics(str(tmp_path / "metrics.json"))["agvm/lr_scale/fpn"]
    assert iterations == (0, 20, 40, 60, 80)
    assert values == (1.1, 1.1, 1.5, 1.5, 1.5)


def test_a_run_killed_while_writing_still_draws(tmp_path):
    write(tmp_path, rows())
    with open(tmp_path / "metrics.json", "a") as f:
        f.write('{"iteration": 100, "lr":')
    plot(str(tmp_path))


def test_a_run_resumed_after_a_torn_line_draws_the_rest(tmp_path, capsys):
    write(tmp_path, rows())
    with open(tmp_path / "metrics.json", "a") as f:
        f.write(
            '{"iteration": 100, "lr":{"iteration": 101, "lr": 3}\n{"iteration": 102, "lr": 7}\n'
        )
    plot(str(tmp_path))
    assert "left out, not JSON" in capsys.readouterr().err
    assert read_metrics(str(tmp_path / "metrics.json"))["lr"][1][-1] == 7


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="train first"):
        plot(str(tmp_path))
    write(tmp_path, rows(modules=()))
    with pytest.raises(ValueError, match="no agvm/variance.*AGVM.START_ITER"):
        plot(str(tmp_path))
    with pytest.raises(SystemExit, match="agvm_d2.plot: error"):
        main([str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="agvm_d2.plot: error"):
        main([str(tmp_path)])


def test_a_loop_that_writes_only_agvms_scalars(tmp_path):
    write(
        tmp_path, [{"iteration": 5, "agvm/variance/backbone": 0.5, "agvm/lr_scale/backbone": 1.0}]
    )
    assert plot(str(tmp_path)).endswith("agvm.png")


@pytest.fixture
def figure(monkeypatch):
    """What was drawn last, from which `axes()` gives the panel of a title."""
    kept = []
    monkeypatch.setattr(module.plt, "close", kept.append)
    yield lambda: kept[-1]
    monkeypatch.undo()
    for one in kept:
        module.plt.close(one)


def panel(figure, title):
    (found,) = (axis for axis in figure.axes if axis.get_title().startswith(title))
    return found


def noisy(start=0, stop=200):
    """Rows with noise scales of `fpn`, drowned in iteration 60, and of the model."""
    made = rows(start, stop)
    for row in made:
        row["lr"] = 0.1 if row["iteration"] < 100 else 0.01
        row["agvm/noise_scale/model"] = 90.0
        if row["iteration"] != 60:
            row["agvm/noise_scale/fpn"] = 30.0
    return made


CONFIG = "SOLVER: {IMS_PER_BATCH: 64}\nAGVM: {MODE: %s, RULE: variance, START_ITER: 17}\n"


@pytest.mark.parametrize("mode", ["monitor", "modulate"])
def test_noise_scales_the_batch_and_what_happened_when(mode, tmp_path, figure):
    write(tmp_path, noisy())
    (tmp_path / "config.yaml").write_text(CONFIG % mode)
    plot(str(tmp_path))
    axis = panel(figure(), "noise scale")
    curves = {line.get_label(): line for line in axis.lines}
    assert axis.get_yscale() == "log"
    images = dict(zip(*curves["fpn"].get_data()))
    assert math.isnan(images.pop(60)) and set(images.values()) == {30}
    assert {"batch 64"} == {text.get_text() for text in axis.texts}
    flat = [line for line in axis.lines if list(line.get_xdata()) == [0, 1]]  # across the panel
    assert [list(line.get_ydata()) for line in flat] == [[64, 64]]
    for title in ("gradient variance", "factor", "noise scale", "losses", "learning rate"):
        lines = panel(figure(), title).lines
        upright = [line.get_xdata()[0] for line in lines if list(line.get_ydata()) == [0, 1]]
        assert upright == [17, 100], title
    monitored = mode == "monitor"
    assert ("not used" in figure().get_suptitle()) == monitored
    assert ("not used" in panel(figure(), "factor").get_title()) == monitored
    assert figure().get_suptitle().startswith("batch 64, AGVM.RULE variance")


def test_no_loss_has_the_colour_of_a_module(tmp_path, figure):
    write(tmp_path, noisy())
    plot(str(tmp_path))

    def colours(title):
        return {
            line.get_color() for line in panel(figure(), title).lines if "_" != line.get_label()[0]
        }

    assert colours("losses") and not colours("losses") & colours("gradient variance")


def test_without_a_config_the_first_measured_iteration_is_the_start(tmp_path, figure):
    write(tmp_path, [{"iteration": 0, "lr": 1.0}, *noisy(40)])
    plot(str(tmp_path))
    assert panel(figure(), "factor").lines[-2].get_xdata()[0] == 40
    assert not panel(figure(), "noise scale").texts


def test_smoothing_reaches_as_far_to_each_side():
    assert smooth([1.0, 5.0]).tolist() == [1, 5]  # too few
    values = np.arange(100.0)
    assert smooth(values).tolist() == values.tolist()  # a line stays, also at its ends
    assert smooth([0.0] * 50 + [5.0] + [0.0] * 49)[48:53].tolist() == [1] * 5


@pytest.mark.parametrize(
    "rates, drops",
    [
        ([1, 1, 0.1, 0.1, 0.01, 0.01], [20, 40]),
        ([1, 1, 0.1, 0.01, 0.01], [20, 30]),  # constant on one side
        ([0.1, 0.5, 1, 1, 1], []),  # warm-up
        ([0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)], []),  # cosine
        ([], []),
    ],
)
def test_drops_of_the_learning_rate(rates, drops):
    assert drops_of((range(0, 10 * len(rates), 10), rates)) == drops


def test_a_runs_config_of_either_kind(tmp_path):
    key = ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size")
    assert read_config(str(tmp_path))(*key, 3) == 3
    (tmp_path / "config.yaml").write_text(CONFIG % "monitor")
    assert read_config(str(tmp_path))(*key) == 64
    LazyConfig.save(LazyConfig.load(VITDET), str(tmp_path / "config.yaml"))
    assert read_config(str(tmp_path))(*key) == 16
    (tmp_path / "config.yaml").write_text("[1]")  # somebody else's
    assert read_config(str(tmp_path))(*key) is None


@pytest.mark.parametrize(
    "ends, wanted",
    [
        ((0.35, 1.1), ["0.4", "0.6", "1"]),
        ((20, 900), ["30", "100", "300"]),
        ((8, 20_000), ["10", "100", "1,000", "10,000"]),
    ],
)
def test_a_log_axis_has_plain_numbers(ends, wanted):
    figure, axis = module.plt.subplots()
    axis.set(yscale="log", ylim=ends)
    module.plain_log(axis.yaxis)
    figure.canvas.draw()
    shown = [
        t.get_text() for t in axis.get_yticklabels() if ends[0] <= t.get_position()[1] <= ends[1]
    ]
    assert shown == wanted
    assert not any(t.get_text() for t in axis.get_yticklabels(minor=True))
    module.plt.close(figure)
