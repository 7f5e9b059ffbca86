"""Real processes: launchers signalled or killed, restarts, workers that disagree or hang."""

import os
import random
import re
import signal
import subprocess
import sys
import time
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from benchmarks import preemption as runs  # noqa: E402

CONFIGS = os.path.join(ROOT, "configs")
YAML = f"{CONFIGS}/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml"
LAZY = f"{CONFIGS}/Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py"
YAML_KEYS = (
    "SOLVER.IMS_PER_BATCH 4 SOLVER.MICRO_BATCH_SIZE 0 SOLVER.MAX_ITER 8 SOLVER.WARMUP_ITERS 1 "
    "SOLVER.STEPS () AGVM.START_ITER 1 AGVM.INTERVAL 2 DATALOADER.NUM_WORKERS 1 SEED 7 "
    "DATASETS.TEST () TEST.EXPECTED_RESULTS [] OUTPUT_DIR"
).split()
LAZY_KEYS = (
    "dataloader.train.total_batch_size=2 train.micro_batch_size=0 train.max_iter=8 "
    "dataloader.train.num_workers=1 dataloader.test.num_workers=0 agvm.start_iter=1 "
    "agvm.interval=2 train.expected_results=[] train.seed=7"
).split()


def worker_pids(run):
    with open(f"/proc/{run.process.pid}/task/{run.process.pid}/children") as f:
        children = f.read().split()
    found = []
    for child in children:
        with open(f"/proc/{child}/cmdline", "rb") as f:
            if b"resource_tracker" not in f.read():
                found.append(int(child))
    return found


@pytest.mark.slow
def test_a_signal_to_the_launcher(tmp_path):
    run = runs.Run("launch", 2, str(tmp_path))
    run.wait_for("phase: training", 3)
    os.kill(run.process.pid, signal.SIGTERM)
    start = time.monotonic()
    assert run.end() == runs.EXIT_CODE == 75, run.output[-4000:]
    assert "SIGTERM: the checkpoint is written" in run.output
    assert "Ended by a signal; --resume goes on from the checkpoint." in run.output
    run.gone()
    assert time.monotonic() - start < 60
    assert 0 <= runs.last(str(tmp_path))["iteration"] < runs.ITERATIONS - 1


def test_a_signal_before_there_is_anything_to_save(tmp_path):
    """Ends as by default, and everything with it."""
    run = runs.Run("launch", 2, str(tmp_path))
    run.wait_for("Rank of current process: 0")
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == -signal.SIGINT, run.output[-4000:]
    run.gone()
    assert not (tmp_path / "last_checkpoint").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [*runs.LAUNCHERS, "detectron2"])
def test_a_killed_launcher_leaves_a_checkpoint_and_no_process(launcher, tmp_path):
    run = runs.Run(launcher, 2, str(tmp_path))
    run.wait_for("phase: training", 3)
    signum = signal.SIGTERM if launcher == "detectron2" else signal.SIGKILL  # it handles none
    os.kill(run.process.pid, signum)
    run.gone(60)
    assert run.end() == -signum
    assert "the checkpoint is written" in run.output
    assert 0 <= runs.last(str(tmp_path))["iteration"] < runs.ITERATIONS - 1


@pytest.mark.slow
def test_a_second_signal_ends_a_run_that_hangs(tmp_path):
    run = runs.Run("launch", 2, str(tmp_path))
    run.wait_for("phase: training", 3)
    os.kill(worker_pids(run)[1], signal.SIGSTOP)
    time.sleep(1)
    os.kill(run.process.pid, signal.SIGTERM)
    time.sleep(3)
    assert run.process.poll() is None
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end(10) == -signal.SIGTERM
    run.gone()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_worker_is_named_and_ends_the_run(rank, tmp_path, monkeypatch):
    monkeypatch.setenv("AGVM_DIST_TIMEOUT", "40")
    run = runs.Run("launch", 2, str(tmp_path))
    run.wait_for("phase: training", 3)
    start = time.monotonic()
    os.kill(worker_pids(run)[rank], signal.SIGSTOP)
    run.wait_for(f"Nothing has been heard of rank {rank} for ")
    assert time.monotonic() - start < 30
    assert run.end(90) not in (0, 75)
    run.gone()
    assert re.search(r"error: worker \d .*--resume", run.output), run.output[-4000:]


@pytest.mark.slow
def test_preempted_runs_go_on_bit_for_bit():
    assert runs.signals(4, random.Random(1))["bit_equal"] == 4


@pytest.mark.slow
def test_restarts_by_torchrun():
    assert runs.restarts(2, random.Random(1))["bit_equal"] == 2


# train_net.py.


def train_net(*args, **env):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "train_net.py", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def output(process, code):
    found = process.communicate(timeout=600)[0]
    assert process.returncode == code, found[-4000:]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_train_net(kind, digits, tmp_path):
    if kind == "lazy":
        pytest.importorskip("timm")

    def command(folder, *flags):
        flags = ("--num-gpus", 2, "--dist-url", "auto", *flags)
        if kind == "lazy":
            keys = [*LAZY_KEYS, f"train.output_dir={folder}", "train.device=cpu"]
            return ("--config-file", LAZY, *flags, *keys)
        return ("--config-file", YAML, *flags, *YAML_KEYS, folder)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output(train_net(*command(whole)), 0)
    process = train_net(*command(cut))
    deadline = time.monotonic() + 300
    log = cut / "log.txt"
    while not log.exists() or "Starting training" not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGUSR1)
    assert "SIGUSR1: the checkpoint is written" in output(process, 75)
    assert not (cut / "model_final.pth").exists()
    output(train_net(*command(cut, "--resume")), 0)
    one, other = (torch.load(f / "model_final.pth", weights_only=True) for f in (whole, cut))
    runs.same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, keys, line",
    [
        ([], ["SOLVER.BASE_LR", "0.5"], r"SOLVER.BASE_LR: 0.\d+ on rank 0; 0.5 on rank 1"),
        ([], ["SOLVER.MAX_ITER", "7"], "SOLVER.MAX_ITER: 8 on rank 0; 7 on rank 1"),
        (["--resume"], [], "--resume: False on rank 0; True on rank 1"),
    ],
)
def test_machines_that_disagree(flags, keys, line, digits, tmp_path):
    url = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{runs.free_port()}"]
    found = [
        train_net(
            "--config-file", YAML, *url, "--machine-rank", i, *(flags * i), *YAML_KEYS, tmp_path,
            *(keys * i), AGVM_DIST_TIMEOUT="60",
        )
        for i in range(2)
    ]  # fmt: skip
    start = time.monotonic()
    for process in found:
        text = output(process, 1)
        assert "The workers do not agree" in text and re.search(line, text), text[-4000:]
        assert "Starting training" not in text
    assert time.monotonic() - start < 120


@pytest.mark.slow
def test_a_machine_that_does_not_come(digits, tmp_path):
    url = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{runs.free_port()}"]
    process = train_net(
        "--config-file", YAML, *url, "--num-gpus", 2, *YAML_KEYS, tmp_path, AGVM_DIST_TIMEOUT="20"
    )
    text = output(process, 1)
    assert "Of 4 workers, rank 2, 3 did not come within 20 s" in text, text[-4000:]


def test_half_of_torchruns_variables(tmp_path):
    process = train_net("--config-file", YAML, *YAML_KEYS, tmp_path, RANK="1", WORLD_SIZE="2")
    line = output(process, 1).splitlines()[-1]
    assert line.startswith("train_net.py: error: RANK=1 is set, but not LOCAL_RANK, LOCAL_WORLD")
    assert not list(tmp_path.iterdir())
