"""Workers of torchrun, Slurm and several machines: their places, and one machine's factors."""

import os
import socket
import subprocess
import sys
from argparse import Namespace
import pytest
import torch

from agvm_d2.d2.launch import Worker, first_host, worker_from_environment

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIGITS = os.path.join(ROOT, "configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml")


def flags(num_gpus=1):
    return Namespace(num_gpus=num_gpus, num_machines=1, machine_rank=0, dist_url="auto")


TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234567",
}


def test_nothing_to_detect():
    args = flags(2)
    assert worker_from_environment(args, {}) is None and args == flags(2)
    batch_shell = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert worker_from_environment(args, batch_shell) is None and args == flags(2)


def test_torchrun():
    args = flags()
    assert worker_from_environment(args, TORCHRUN) == Worker(5, 1, 8, 4, "env://")
    assert (args.num_gpus, args.num_machines) == (4, 2)


def test_slurm_with_a_task_a_worker():
    args = flags()
    assert worker_from_environment(args, SLURM) == Worker(5, 1, 8, 4, "tcp://gpu03:34567")
    assert (args.num_gpus, args.num_machines) == (4, 2)
    given = {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert worker_from_environment(flags(), given).dist_url == "tcp://10.0.0.1:29500"


def test_slurm_with_a_task_a_machine():
    args = flags(num_gpus=4)
    env = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert worker_from_environment(args, env) is None
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (4, 2, 1)
    assert args.dist_url == "tcp://gpu03:34567"


def test_flags_that_contradict_the_environment():
    with pytest.raises(ValueError, match="--num-gpus 8: torchrun has started 4 workers"):
        worker_from_environment(flags(8), TORCHRUN)
    with pytest.raises(ValueError, match="different numbers of tasks, 4,3: .*ntasks-per-node"):
        worker_from_environment(flags(), {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4,3"})


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("a", "a"),
        ("a1,b2", "a1"),
        ("gpu[03-05,9],b", "gpu03"),
        ("rack2-n[7]", "rack2-n7"),
        ("n[1-2]-ib,m", "n1-ib"),
        ("rack[0-1]node[03,5],m[1-2]", "rack0node03"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


# Real processes.

SHORT = (
    "SOLVER.IMS_PER_BATCH 8 SOLVER.MICRO_BATCH_SIZE 0 SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 1 "
    "SOLVER.STEPS (2,) AGVM.START_ITER 1 AGVM.INTERVAL 1 DATALOADER.NUM_WORKERS 0 SEED 7 "
    "DATASETS.TEST ()"
).split()


def start(command, out, **env):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, command), "OUTPUT_DIR", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def finish(processes):
    for process in processes:
        output = process.communicate(timeout=3600)[0]
        assert process.returncode == 0, output[-4000:]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def state(out):
    return torch.load(out / "model_final.pth", weights_only=True)


def train(*flags):
    return ["train_net.py", "--config-file", DIGITS, *flags, *SHORT]


@pytest.fixture(scope="module")
def one_machine(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    finish([start(train("--num-gpus", 4, "--dist-url", "auto"), out)])
    return state(out)


def same(one, other):
    """Bit for bit, whoever started the workers: factors and weights."""
    hooks = [s["trainer"]["hooks"]["AGVMHook"] for s in (one, other)]
    assert hooks[0]["factors"] == hooks[1]["factors"]
    assert any(abs(f - 1) > 1e-3 for f in hooks[0]["factors"])
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


@pytest.mark.slow
def test_two_machines_of_two_workers(one_machine, tmp_path):
    url = f"tcp://127.0.0.1:{free_port()}"
    finish(
        [
            start(
                train("--num-gpus", 2, "--num-machines", 2, "--machine-rank", i, "--dist-url", url),
                tmp_path / "out",
            )
            for i in range(2)
        ]
    )
    same(one_machine, state(tmp_path / "out"))


@pytest.mark.slow
def test_torchrun_on_two_machines(one_machine, tmp_path):
    port = free_port()
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--nnodes", 2]
    command += ["--master-addr", "127.0.0.1", "--master-port", port]
    finish(
        [start([*command, "--node-rank", i, *train()], tmp_path / "out") for i in range(2)],
    )
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
    finish(
        [
            start(train(), tmp_path / "out", SLURM_PROCID=str(i), SLURM_LOCALID=str(i % 2), **env)
            for i in range(4)
        ]
    )
    same(one_machine, state(tmp_path / "out"))
