import json
import pytest

from agvm_d2.plot import main, plot, read_metrics


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


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="train first"):
        plot(str(tmp_path))
    write(tmp_path, rows(modules=()))
    with pytest.raises(ValueError, match="no agvm/variance.*AGVM.START_ITER"):
        plot(str(tmp_path))
    (tmp_path / "metrics.json").write_text("{\n{}\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        plot(str(tmp_path))
    with pytest.raises(SystemExit, match="agvm_d2.plot: error"):
        main([str(tmp_path)])


def test_a_loop_that_writes_only_agvms_scalars(tmp_path):
    write(
        tmp_path, [{"iteration": 5, "agvm/variance/backbone": 0.5, "agvm/lr_scale/backbone": 1.0}]
    )
    assert plot(str(tmp_path)).endswith("agvm.png")
