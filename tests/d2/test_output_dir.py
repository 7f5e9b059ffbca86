"""One run at a time in a folder, and an older one set aside."""

import json
import os
import signal
import subprocess
import sys
import pytest
import torch
from detectron2.engine import default_argument_parser
from toy import toy_config, train

import train_net
from agvm_d2.d2 import output_dir
from agvm_d2.d2.output_dir import FolderLock, holds_a_run, set_aside
from agvm_d2.plot import read_metrics

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(HERE)
DIGITS = os.path.join(ROOT, "configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml")
SHORT = (
    "SOLVER.IMS_PER_BATCH 2 SOLVER.MICRO_BATCH_SIZE 1 SOLVER.MAX_ITER 2 SOLVER.WARMUP_ITERS 0 "
    "SOLVER.WARMUP_METHOD linear SOLVER.STEPS () AGVM.START_ITER 0 DATALOADER.NUM_WORKERS 0"
).split()

pytestmark = pytest.mark.integration  # processes of their own

HOLD = """
import sys, time
from agvm_d2.d2.output_dir import FolderLock
lock = FolderLock.take(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Starts a process that trains in tmp_path."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": ROOT},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_another_run_is_named_and_a_killed_one_locks_nobody_out(other, tmp_path, monkeypatch):
    monkeypatch.setattr(output_dir, "GRACE", 0.3)
    (tmp_path / "model_0.pth.host-1.part").write_text("of a killed run")
    (tmp_path / "images.zip.part").write_text("the user's own")
    process = other()
    assert [path.name for path in tmp_path.glob("*.part")] == ["images.zip.part"]
    with pytest.raises(FileExistsError, match=f"OUTPUT_DIR: .*: process {process.pid} on .*since"):
        FolderLock.take(str(tmp_path))
    with pytest.raises(FileExistsError, match=f"process {process.pid}"):
        train(toy_config(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / output_dir.LOCK).exists()
    lock = FolderLock.take(str(tmp_path))
    assert FolderLock.take(str(tmp_path)) is lock  # this process's own
    del lock
    other()  # is free again


def test_training_leaves_the_folder_free(other, tmp_path):
    trainer = train(toy_config(tmp_path))  # noqa: F841  still there
    other()


def test_a_projects_own_script_is_told_of_an_older_run(tmp_path, d2_log):
    train(toy_config(tmp_path))
    assert "holds an older run" not in d2_log.text
    train(toy_config(tmp_path))
    assert d2_log.text.count("holds an older run") == 1
    set_aside(str(tmp_path))
    train(toy_config(tmp_path))
    assert d2_log.text.count("holds an older run") == 1


def test_a_file_system_without_locks_is_told_once(tmp_path, monkeypatch, d2_log):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(output_dir.fcntl, "lockf", no_locks)
    assert FolderLock.take(str(tmp_path)) is None
    assert "cannot be locked ([Errno 37] No locks available)" in d2_log.text


def test_a_config_is_kept_also_where_its_body_raises(tmp_path):
    (tmp_path / "config.yaml").write_text("old")
    (tmp_path / "model_final.pth").write_text("")
    with pytest.raises(TypeError), output_dir.config_kept(str(tmp_path)):
        (tmp_path / "config.yaml").write_text("new")
        raise TypeError
    assert (tmp_path / "config.yaml").read_text() == "old"


def old_run(folder):
    files = "metrics.json last_checkpoint model_0000001.pth model_final.pth log.txt log.txt.rank1"
    for name in (*files.split(), "config.yaml", "events.out.tfevents.1.a.2.0", "mine.txt"):
        (folder / name).write_text(name)
    (folder / "inference").mkdir()


def test_an_older_run_is_set_aside_whole(tmp_path):
    old_run(tmp_path)
    kept = [str(tmp_path / name) for name in ("model_final.pth", "config.yaml")]
    target = set_aside(str(tmp_path), keep=["", *kept])
    moved = sorted(os.listdir(target))
    assert moved == [
        "config.yaml", "events.out.tfevents.1.a.2.0", "last_checkpoint", "log.txt",
        "log.txt.rank1", "metrics.json", "model_0000001.pth", "model_final.pth",
    ]  # fmt: skip
    for name in moved:
        assert open(os.path.join(target, name)).read() == name
    left = {"inference", "mine.txt", "model_final.pth", "config.yaml", os.path.basename(target)}
    assert set(os.listdir(tmp_path)) == left
    (tmp_path / "model_final.pth").unlink()
    assert set_aside(str(tmp_path)) == ""  # none there now
    old_run_again = [tmp_path / "metrics.json", tmp_path / "last_checkpoint"]
    for path in old_run_again:
        path.write_text("x")
    assert set_aside(str(tmp_path)) != target


@pytest.mark.parametrize(
    "names, holds", [([], False), (["log.txt"], False), (["model_1.pth"], True)]
)
def test_what_is_a_run(names, holds, tmp_path):
    (tmp_path / "metrics.json").write_text("")  # of a start that failed
    for name in names:
        (tmp_path / name).write_text("x")
    assert holds_a_run(str(tmp_path)) == holds


def run(*args, ok=True):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", os.path.join(ROOT, "train_net.py"), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stdout[-3000:]
    return done.stdout


def test_train_net_in_a_folder_that_has_a_run(digits, tmp_path):
    """A second run, a resume that is refused, an evaluation: metrics and config.yaml stay true."""
    out = tmp_path / "o"
    common = ["--config-file", DIGITS]
    rest = [*SHORT, "OUTPUT_DIR", out, "DATASETS.TEST", "()"]
    run(*common, *rest)
    first = (out / "model_final.pth").read_bytes()
    text = run(*common, *rest, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 0.01)
    (old,) = out.glob("old-*")
    assert f"'{out}' held an older run, which is now in '{old}'" in text
    assert (old / "model_final.pth").read_bytes() == first
    assert read_metrics(str(out / "metrics.json"))["lr"] == ((0,), (0.01,))
    assert max(read_metrics(str(old / "metrics.json"))["lr"][0]) == 1
    assert "held an older run" in (out / "log.txt").read_text()
    config = (out / "config.yaml").read_text()
    assert "BASE_LR: 0.01" in config and "MAX_ITER: 1\n" in config

    final = out / "model_final.pth"
    run(*common, "--eval-only", *rest[:-2], "SOLVER.BASE_LR", 0.5, "MODEL.WEIGHTS", final)
    assert (out / "config.yaml").read_text() == config
    text = run(*common, "--resume", *rest, "SOLVER.MAX_ITER", 4, "AGVM.MODULES",
               "(('all', '.*'),)", "AGVM.ANCHOR", "all", ok=False)  # fmt: skip
    assert "Resume with the model and AGVM.MODULES of the saved run" in text
    assert (out / "config.yaml").read_text() == config
    run(*common, "--resume", *rest, "SOLVER.MAX_ITER", 3, "SOLVER.BASE_LR", 0.02, "SEED", 77)
    config = (out / "config.yaml").read_text()
    assert "BASE_LR: 0.02" in config and "MAX_ITER: 3\n" in config and "SEED: 77" not in config
    assert len(list(out.glob("old-*"))) == 1


def test_train_net_beside_another_run(other, digits, tmp_path):
    process = other()
    before = sorted(os.listdir(tmp_path))
    text = run("--config-file", DIGITS, *SHORT, "OUTPUT_DIR", tmp_path, ok=False)
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"train_net.py: error: OUTPUT_DIR: another run trains in '{tmp_path}'")
    assert f"process {process.pid} on" in last and sorted(os.listdir(tmp_path)) == before


def test_a_resume_that_has_nothing_left_to_do_is_told_before_it_starts(digits, tmp_path):
    torch.save({"model": {}, "iteration": 7}, tmp_path / "model_0000007.pth")
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER: found 5, but .* has 8 iterations done"):
        train_net.setup(args("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 5, resume=True))
    train_net.setup(args("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 8, resume=True))


def args(*opts, resume=False, eval_only=False):
    flags = ["--config-file", DIGITS] + ["--resume"] * resume + ["--eval-only"] * eval_only
    return default_argument_parser().parse_args([*flags, *map(str, opts)])


def test_eval_only_without_weights_is_refused(digits, tmp_path):
    with pytest.raises(ValueError, match="--eval-only: MODEL.WEIGHTS is empty, so random weights"):
        train_net.setup(args("OUTPUT_DIR", tmp_path, eval_only=True))
    with pytest.raises(ValueError, match="add --resume"):  # but there is nothing
        train_net.setup(args("OUTPUT_DIR", tmp_path, eval_only=True, resume=True))
    torch.save({"model": {}, "iteration": 3}, tmp_path / "model_0000003.pth")
    train_net.setup(args("OUTPUT_DIR", tmp_path, eval_only=True, resume=True))
    torch.save({"model": {}}, tmp_path / "w.pth")
    weights = ["MODEL.WEIGHTS", tmp_path / "w.pth"]
    train_net.setup(args("OUTPUT_DIR", tmp_path / "b", *weights, eval_only=True))


def test_a_lazy_config_without_weights(digits, tmp_path):
    pytest.importorskip("timm")
    config = "configs/Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py"
    found = args(f"train.output_dir={tmp_path}", "train.init_checkpoint=''", eval_only=True)
    found.config_file = os.path.join(ROOT, config)
    with pytest.raises(ValueError, match="--eval-only: train.init_checkpoint is empty"):
        train_net.setup(found)


def test_metrics_of_a_lazy_run_resumed_with_changed_keys(digits, tmp_path, d2_log):
    pytest.importorskip("timm")
    from agvm_d2.d2 import lazy

    path = "configs/Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py"

    def load(*opts):
        short = (
            "dataloader.train.total_batch_size=4 train.micro_batch_size=2 train.max_iter=2 "
            "dataloader.train.num_workers=0 agvm.start_iter=0 agvm.interval=1 train.log_period=1 "
            "train.expected_results=[]"
        ).split()
        cfg = lazy.load(os.path.join(ROOT, path), [*short, f"train.output_dir={tmp_path}", *opts])
        del cfg.dataloader["evaluator"]
        return cfg

    from detectron2.config import LazyConfig

    first = load()
    LazyConfig.save(first, str(tmp_path / "config.yaml"))
    lazy.do_train(first)
    new = ["optimizer.lr=1e-7", "agvm.anchor=rpn", "train.seed=9", "train.max_iter=3"]
    lazy.do_train(load(*new, "dataloader.train.total_batch_size=8"), resume=True)
    for key in ("optimizer.lr", "agvm.anchor", "dataloader.train.total_batch_size", "train.seed"):
        assert f"Resumed at iteration 2 with another {key}: saved " in d2_log.text
    assert "factors were saved with anchor backbone: they start at 1 again" in d2_log.text
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert rows[-1]["iteration"] == 2 and rows[-1]["lr"] < 1e-6 < rows[0]["lr"]
    config = (tmp_path / "config.yaml").read_text()
    assert "1.0e-07" in config and "seed: 9" not in config
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["hooks"]
    assert saved["IterationSeeder"]["images"] == 16  # 8, and 8 more
    with pytest.raises(ValueError, match="train.max_iter: found 1, but the checkpoint .* has 3 it"):
        lazy.do_train(load("train.max_iter=1"), resume=True)
