"""Start the workers: Detectron2's own launch(), or join those that torchrun or Slurm started."""

from __future__ import annotations
import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import Any
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import multiprocessing as mp

from ..validate import require
from .handover import raise_open_files
from .preemption import EXIT_CODE, Preempted, SignalCatcher, end_by, leave_with_the_launcher
from .rendezvous import Pulse, Worker, meet, restarts, training_timeout

LAST_WORDS = {EXIT_CODE: 120.0}  # s, for the other workers, by the exit code of the first to end
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def worker_from_environment(args: Namespace, env: Mapping[str, str] = os.environ) -> Worker | None:
    """Fit `args` (Detectron2's flags) to torchrun's or Slurm's environment.

    With torchrun, or one Slurm task per worker, `args.num_gpus` and `args.num_machines` become the
    workers per machine and the machines, and this process is one Worker. With one Slurm task per
    machine and `--num-gpus N`, the flags of many machines are filled in, and None is returned: this
    process starts its workers itself, as without Slurm.

    Raises:
        ValueError: machines with different numbers of workers; --num-gpus against the environment;
            a rank out of range; half of torchrun's variables.
    """
    require(args.num_gpus >= 1, "--num-gpus", args.num_gpus, "be 1 or more, also on a CPU")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank: found {args.machine_rank}, but with --num-machines "
            f"{args.num_machines} it must be from 0 to {args.num_machines - 1}."
        )
    if "LOCAL_WORLD_SIZE" in env and "RANK" in env:  # torchrun
        _check_torchrun(env)
        rank, local_rank, world_size, local_size = (int(env[key]) for key in RANKS)
        return _worker(args, "torchrun", rank, local_rank, world_size, local_size, "env://")
    # Set by srun in a job step only: not in the shell of an sbatch script or of salloc.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "SLURM_PROCID" not in env:
        if args.num_machines == 1 and "RANK" in env and env.get("WORLD_SIZE", "1") != "1":
            _check_torchrun(env)  # each process would be a run of its own, all in one folder
        elif args.num_machines > 1 and args.dist_url == "auto":
            raise ValueError(
                "--dist-url: found 'auto', but with several machines it must be "
                "tcp://HOST_OF_MACHINE_0:PORT."
            )
        return None
    url = f"tcp://{env.get('MASTER_ADDR') or first_host(env['SLURM_STEP_NODELIST'])}:" + (
        env.get("MASTER_PORT") or str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 12000)
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


def _check_torchrun(env: Mapping[str, str]) -> None:
    """
    Raises:
        ValueError: names the variables.
    """
    missing = [key for key in RANKS if not env.get(key)]
    if missing:
        raise ValueError(
            f"RANK={env['RANK']} is set, but not {', '.join(missing)}: start the workers with "
            "torchrun, which sets all of them, or set them too; or unset RANK and WORLD_SIZE."
        )
    for below, above in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        found, size = env[below], env[above]
        if not (found.isdecimal() and size.isdecimal() and int(found) < int(size)):
            raise ValueError(
                f"{below}={found} and {above}={size}: they must be whole numbers, {below} from 0 "
                f"to {above} - 1."
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
        SystemExit: a worker failed or was killed; the others are stopped. Or a signal came: the
            code is EXIT_CODE if a checkpoint was written.
    """
    if worker is not None:
        leave_with_the_launcher()
        _work(main, args, worker)
    elif args.num_gpus * args.num_machines == 1:
        _call(main, args)
    else:
        _spawn(main, args)


def _call(main: Callable, args: Namespace) -> None:
    with contextlib.suppress(Preempted):
        main(args)
        return
    # Out of the exception, whose traceback holds the loader: torch waits 5 s for it at the exit.
    sys.exit(EXIT_CODE)


def _work(main: Callable, args: Namespace, worker: Worker) -> None:
    """Join the other workers and call `main`, as Detectron2's launch() does."""
    raise_open_files()  # rank 0 has some for each worker
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(worker.local_rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=meet(worker),
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=training_timeout(),
    )
    pulse = Pulse(worker)
    try:
        comm.create_local_process_group(worker.local_size)
        comm.synchronize()
        # A machine that only had to follow another's restart counts none.
        if max(comm.all_gather(restarts())):
            args.resume = True
        _call(main, args)
    finally:
        pulse.stop()
    # Not after a failure: NCCL may wait there for workers that wait for this one's end.
    dist.destroy_process_group()


def _spawned(local_rank: int, main: Callable, args: Namespace, url: str) -> None:
    leave_with_the_launcher()
    with contextlib.suppress(KeyboardInterrupt):
        _join(local_rank, main, args, url)
        return
    end_by(signal.SIGINT)  # torch would make it an exit code of 0


def _join(local_rank: int, main: Callable, args: Namespace, url: str) -> None:
    size = args.num_gpus
    if "OMP_NUM_THREADS" not in os.environ:  # else each worker has a thread for every core
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    rank = args.machine_rank * size + local_rank
    _work(main, args, Worker(rank, local_rank, size * args.num_machines, size, url))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone: SIGHUP
        print(line, file=sys.stderr)
        sys.stdout.flush()


def _first_to_fail(processes: list[Any]) -> Any:
    """The first that ends with an exit code other than 0; None: all have ended well."""
    running = list(processes)
    while running:
        wait([process.sentinel for process in running])
        ended = [process for process in running if not process.is_alive()]
        running = [process for process in running if process not in ended]
        for process in ended:
            if process.exitcode:
                return process
    return None


def _end(processes: list[Any], patience: float) -> None:
    """By SIGTERM, and those that do not hear it or are not done in `patience` seconds by force."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _spawn(main: Callable, args: Namespace) -> None:
    """Detectron2's launch() for several workers, which also passes signals on."""
    url = args.dist_url
    if url == "auto":
        url = f"tcp://127.0.0.1:{_free_port()}"

    def pass_on(signum: int) -> None:
        for process in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signum)

    signals = SignalCatcher(pass_on, on_end=lambda: pass_on(signal.SIGKILL))
    signals.install()
    try:
        context = mp.start_processes(_spawned, (main, args, url), nprocs=args.num_gpus, join=False)
        if signals.signum:  # it came before all of them were there
            pass_on(signals.signum)
        failed = _first_to_fail(context.processes)
        if failed is not None:
            _end(context.processes, LAST_WORDS.get(failed.exitcode or 0, 5.0))
            # So that context.join() speaks of it, and not of those that were ended.
            context.sentinels = {failed.sentinel: context.processes.index(failed)}
        while not context.join():
            pass
    except mp.ProcessRaisedException as error:
        sys.exit(f"{error}\n{_ended(f'worker {error.error_index} failed, see above')}")
    except mp.ProcessExitedException as error:
        # The main process writes the checkpoint; on other machines there is none to ask.
        main_code = EXIT_CODE if args.machine_rank else context.processes[0].exitcode
        if error.exit_code == main_code == EXIT_CODE:
            _tell("Ended by a signal; --resume goes on from the checkpoint.")
            sys.exit(EXIT_CODE)
        how = error.signal_name or f"exit code {error.exit_code}"
        line = _ended(f"worker {error.error_index} ended by {how}")
        if not signals.signum:
            sys.exit(line)
        _tell(line)
        end_by(signals.signum)
    finally:
        signals.restore()
