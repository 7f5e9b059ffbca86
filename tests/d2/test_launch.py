"""Workers of torchrun, Slurm and several machines: their places."""

from argparse import Namespace
import pytest

from agvm_d2.d2.launch import Worker, first_host, worker_from_environment


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
    assert worker_from_environment(args, SLURM) == Worker(5, 1, 8, 4, "tcp://gpu03:30567")
    assert (args.num_gpus, args.num_machines) == (4, 2)
    given = {**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert worker_from_environment(flags(), given).dist_url == "tcp://10.0.0.1:29500"


def test_slurm_with_a_task_a_machine():
    args = flags(num_gpus=4)
    env = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert worker_from_environment(args, env) is None
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (4, 2, 1)
    assert args.dist_url == "tcp://gpu03:30567"  # below what Linux gives to connections


def test_flags_that_contradict_the_environment():
    with pytest.raises(ValueError, match="--num-gpus: found 0, but it must be 1 or more"):
        worker_from_environment(flags(num_gpus=0), {})
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
