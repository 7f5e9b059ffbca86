"""Workers of several machines, of torchrun and of Slurm: the bits of one machine's."""

import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
import pytest
import torch
from helpers import DIGITS, finish, start

from agvm_d2.d2.launch import launch
from agvm_d2.d2.preemption import EXIT_CODE

SHORT = (
    "SOLVER.IMS_PER_BATCH 8 SOLVER.MICRO_BATCH_SIZE 0 SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1 "
    "SOLVER.STEPS (2,) AGVM.START_ITER 1 AGVM.INTERVAL 1 DATALOADER.NUM_WORKERS 0 SEED 7 "
    "DATASETS.TEST ()"
).split()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def state(out):
    return torch.load(out / "model_final.pth", weights_only=True)


def train(*flags):
    return ["train_net.py", "--config-file", DIGITS, *flags, *SHORT, "OUTPUT_DIR"]


@pytest.fixture(scope="module")
def one_machine(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    finish(start(*train("--num-gpus", 4, "--dist-url", "auto"), out))
    return state(out)


def same(one, other):
    """Bit for bit, whoever started the workers: factors and weights."""
    hooks = [s["trainer"]["hooks"]["AGVMHook"] for s in (one, other)]
    assert hooks[0]["factors"] == hooks[1]["factors"]
    assert any(abs(f - 1) > 1e-3 for f in hooks[0]["factors"])
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


def write_threads(args):
    rank = torch.distributed.get_rank()
    (args.folder / str(rank)).write_text(str(torch.get_num_threads()))


def threads_of_workers(folder):
    args = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    launch(write_threads, Namespace(folder=folder, **args), None)
    return [int((folder / str(rank)).read_text()) for rank in range(2)]


@pytest.mark.parametrize("given", [None, "2"], ids=["shared", "given"])
def test_threads_of_workers(given, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    one = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    alone = int(subprocess.run(one, capture_output=True, check=True).stdout)
    assert threads_of_workers(tmp_path) == 2 * [alone if given else max(1, alone // 2)]


def leave_one_by_one(args):
    """Rank 1 has heard a signal, and rank 0 needs longer than torch would wait."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if torch.distributed.get_rank():
        os._exit(EXIT_CODE)
    time.sleep(args.seconds)
    (args.folder / "saved").touch()
    os._exit(EXIT_CODE)


@pytest.mark.slow
def test_the_main_worker_has_time_to_save(tmp_path):
    args = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    with pytest.raises(SystemExit) as ended:
        launch(leave_one_by_one, Namespace(folder=tmp_path, seconds=40, **args), None)
    assert ended.value.code == EXIT_CODE and (tmp_path / "saved").exists()


def fail_alone(args):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if torch.distributed.get_rank():
        raise KeyError("its own")
    time.sleep(600)


def test_the_first_to_fail_is_named_and_one_that_hangs_is_killed():
    args = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    with pytest.raises(SystemExit, match="KeyError: 'its own'(?s:.*)worker 1 failed, see above"):
        launch(fail_alone, Namespace(**args), None)


def all_of(processes):
    for process in processes:
        finish(process)


@pytest.mark.slow
def test_two_machines_of_two_workers(one_machine, tmp_path):
    url = f"tcp://127.0.0.1:{free_port()}"
    flags = ["--num-gpus", 2, "--num-machines", 2, "--dist-url", url, "--machine-rank"]
    all_of([start(*train(*flags, i), tmp_path / "out") for i in range(2)])
    same(one_machine, state(tmp_path / "out"))


@pytest.mark.slow
def test_torchrun_on_two_machines(one_machine, tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--nnodes", 2]
    command += ["--master-addr", "127.0.0.1", "--master-port", free_port(), "--node-rank"]
    all_of([start(*command, i, *train(), tmp_path / "out") for i in range(2)])
    same(one_machine, state(tmp_path / "out"))


@pytest.mark.slow
def test_slurm_tasks(one_machine, tmp_path):
    env = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [{**env, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % 2)} for i in range(4)]
    all_of([start(*train(), tmp_path / "out", **task) for task in tasks])
    same(one_machine, state(tmp_path / "out"))
