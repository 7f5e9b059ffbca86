"""Start the workers: Detectron2's own launch(), or join those that torchrun or Slurm started."""

from __future__ import annotations
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import NamedTuple
import torch
import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException


class Worker(NamedTuple):
    """This process's place among workers that somebody else started."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    dist_url: str


def worker_from_environment(args: Namespace, env: Mapping[str, str] = os.environ) -> Worker | None:
    """Fit `args` (Detectron2's flags) to torchrun's or Slurm's environment.

    With torchrun, or one Slurm task per worker, `args.num_gpus` and `args.num_machines` become the
    workers per machine and the machines, and this process is one Worker. With one Slurm task per
    machine and `--num-gpus N`, the flags of many machines are filled in, and None is returned: this
    process starts its workers itself, as without Slurm.

    Raises:
        ValueError: machines with different numbers of workers; --num-gpus against the environment.
    """
    if "LOCAL_WORLD_SIZE" in env and "RANK" in env:  # torchrun
        keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        rank, local_rank, world_size, local_size = (int(env[key]) for key in keys)
        return _worker(args, "torchrun", rank, local_rank, world_size, local_size, "env://")
    # Set by srun in a job step only: not in the shell of an sbatch script or of salloc.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "SLURM_PROCID" not in env:
        return None
    url = f"tcp://{env.get('MASTER_ADDR') or first_host(env['SLURM_STEP_NODELIST'])}:" + (
        env.get("MASTER_PORT") or str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)
    )
    machines = int(env["SLURM_STEP_NUM_NODES"])
    if args.num_gpus > 1 and tasks == machines:
        args.num_machines, args.machine_rank = machines, int(env["SLURM_NODEID"])
        args.dist_url = url
        return None
    sizes = env["SLURM_STEP_TASKS_PER_NODE"]  # "4(x2)", or "4,3"
    if "," in sizes:
        raise ValueError(
            f"Slurm gave the nodes different numbers of tasks, {sizes}: use --ntasks-per-node."
        )
    return _worker(
        args,
        "Slurm",
        int(env["SLURM_PROCID"]),
        int(env["SLURM_LOCALID"]),
        tasks,
        int(sizes.split("(")[0]),
        url,
    )


def _worker(
    args: Namespace,
    starter: str,
    rank: int,
    local_rank: int,
    world_size: int,
    local_size: int,
    url: str,
) -> Worker:
    if args.num_gpus not in (1, local_size):
        raise ValueError(
            f"--num-gpus {args.num_gpus}: {starter} has started {local_size} workers on this "
            "machine already; leave the flag out."
        )
    args.num_gpus, args.num_machines = local_size, world_size // local_size
    return Worker(rank, local_rank, world_size, local_size, url)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: "a[03-05,9]b[1-2],c" -> "a03b1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    assert first is not None  # it also matches nothing
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group())


def _ended(how: str) -> str:
    return (
        f"error: {how}; the other workers were stopped. If there is a checkpoint, it is whole, and "
        "once the cause is gone the same command with --resume goes on from it."
    )


def launch(main: Callable, args: Namespace, worker: Worker | None) -> None:
    """Run `main(args)` in every worker; `worker` is what `worker_from_environment` returned.

    Raises:
        SystemExit: a worker failed or was killed; the others are stopped.
    """
    if worker is None:
        try:
            d2_launch(
                main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
        except ProcessRaisedException as error:
            sys.exit(f"{error}\n{_ended(f'worker {error.error_index} failed, see above')}")
        except ProcessExitedException as error:
            how = error.signal_name or f"exit code {error.exit_code}"
            sys.exit(_ended(f"worker {error.error_index} ended by {how}"))
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(worker.local_rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=worker.dist_url,
        rank=worker.rank,
        world_size=worker.world_size,
    )
    try:
        comm.create_local_process_group(worker.local_size)
        comm.synchronize()
        main(args)
    finally:
        dist.destroy_process_group()
