"""Workers that meet, and each way not to: one clear error within the stated time."""

import os
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
import pytest
import torch.distributed as dist

from agvm_d2.d2.launch import worker_from_environment
from agvm_d2.d2.rendezvous import Pulse, Worker, meet, start_timeout, training_timeout

pytestmark = pytest.mark.integration  # processes of their own


@pytest.fixture(autouse=True)
def two_seconds(monkeypatch):
    monkeypatch.setenv("AGVM_DIST_TIMEOUT", "2")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def all_meet(ranks, size, url) -> list:
    """What `meet` returns or raises for each rank, each in a thread."""
    found = [None] * len(ranks)

    def run(i, rank):
        try:
            found[i] = meet(Worker(rank, rank, size, size, url))
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(ranks)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    return found


def test_all_come():
    stores = all_meet([0, 1, 2], 3, f"tcp://127.0.0.1:{free_port()}")
    stores[2].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3


def test_a_file_in_place_of_an_address(tmp_path):
    stores = all_meet([0, 1], 2, f"file://{tmp_path}/store")
    stores[1].set("key", "value")
    assert stores[0].get("key") == b"value"


def test_ranks_that_do_not_come():
    start = time.monotonic()
    errors = all_meet([0, 2], 4, f"tcp://127.0.0.1:{free_port()}")
    assert 2 < time.monotonic() - start < 10
    for error, rank in zip(errors, (0, 2)):
        assert isinstance(error, ConnectionError)
        assert "Of 4 workers, rank 1, 3 did not come within 2 s" in str(error)
        assert f"(rank {rank} is on '{socket.gethostname()}')" in str(error)
        assert "AGVM_DIST_TIMEOUT" in str(error)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_nobody_at_the_address(host):
    port = free_port()
    start = time.monotonic()
    error = all_meet([1], 2, f"tcp://{host}:{port}")[0]
    assert time.monotonic() - start < 30
    assert isinstance(error, ConnectionError)
    assert f"--dist-url: rank 1 cannot reach rank 0 at {host}:{port} within 2 s" in str(error)


def test_a_port_in_use():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        error = all_meet([0], 2, f"tcp://127.0.0.1:{port}")[0]
    assert f"--dist-url: port {port} of '127.0.0.1' is in use" in str(error)


def test_one_rank_twice():
    found = all_meet([0, 1, 1], 2, f"tcp://127.0.0.1:{free_port()}")
    told = [str(one) for one in found if isinstance(one, Exception)]
    assert len(told) == 1 and "Two workers have rank 1" in told[0] and "--machine-rank" in told[0]


def test_a_restart_by_torchrun_does_not_meet_dead_workers(monkeypatch):
    """torchrun's own store lives on, with what the workers of before have left there."""
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for key, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for count in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        stores = all_meet([0, 1], 2, "env://")
        assert not stores[0].check(["address"])
        stores[1].set("address", "of a worker")
    error = all_meet([0], 2, "env://")[0]  # the same count again
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(error)
    del agent


def test_the_timeout(monkeypatch):
    assert start_timeout().total_seconds() == training_timeout().total_seconds() == 2
    monkeypatch.delenv("AGVM_DIST_TIMEOUT")
    assert (start_timeout().total_seconds(), training_timeout().total_seconds()) == (300, 1800)
    for bad in ("soon", "0", "-5", "nan", "inf"):
        monkeypatch.setenv("AGVM_DIST_TIMEOUT", bad)
        with pytest.raises(ValueError, match=f"AGVM_DIST_TIMEOUT: found '{bad}'"):
            start_timeout()


@pytest.mark.parametrize("url, key", [("env://", "MASTER_ADDR"), ("tcp://host", "--dist-url")])
def test_half_an_address(url, key, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    error = all_meet([0], 2, url)[0]
    assert isinstance(error, ConnectionError)
    assert str(error).startswith(key) and "is no address" in str(error)


# What the environment and the flags say of this process's place.

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def flags(**others):
    values = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    return Namespace(**{**values, **others})


@pytest.mark.parametrize(
    "env, message",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, LOCAL_WORLD_SIZE: start .* torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "not LOCAL_WORLD_SIZE: "),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "RANK=0 is set, but not LOCAL_RANK, WORLD_SIZE: "),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1 and WORLD_SIZE=2"),
        ({**TORCHRUN, "LOCAL_RANK": "two"}, "LOCAL_RANK=two and LOCAL_WORLD_SIZE=2"),
    ],
)
def test_ranks_that_cannot_be(env, message):
    with pytest.raises(ValueError, match=message):
        worker_from_environment(flags(), env)


def test_flags_that_cannot_be():
    for machine_rank in (2, -1):
        with pytest.raises(ValueError, match=f"--machine-rank: found {machine_rank}, .* 0 to 1"):
            worker_from_environment(flags(num_machines=2, machine_rank=machine_rank), {})
    with pytest.raises(ValueError, match="--dist-url: found 'auto'"):
        worker_from_environment(flags(num_machines=2), {})


def test_ranks_of_machines_that_the_flags_repeat():
    """As in Kubeflow's pods: `--num-machines $WORLD_SIZE --machine-rank $RANK`."""
    args = flags(num_machines=2, machine_rank=1, dist_url="tcp://host:1234", num_gpus=4)
    assert worker_from_environment(args, {"RANK": "1", "WORLD_SIZE": "2"}) is None
    assert worker_from_environment(flags(), {"RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize("silent", [0, 2])
def test_a_worker_that_falls_silent_is_named(silent, monkeypatch, d2_log, capfd):
    """In three of the twelve seconds that the others would wait for it."""
    url = f"tcp://127.0.0.1:{free_port()}"
    stores = all_meet([0, 1, 2], 3, url)
    monkeypatch.setenv("AGVM_DIST_TIMEOUT", "12")
    pulses = [Pulse(Worker(rank, rank, 3, 3, url)) for rank in range(3)]
    time.sleep(4)
    assert "Nothing has been heard" not in d2_log.text
    pulses[silent].stop()
    time.sleep(6)
    assert f"Nothing has been heard of rank {silent} for " in d2_log.text
    assert d2_log.text.count("Nothing has been heard") == 1
    assert ("rank 1: Nothing has been heard of rank 0" in capfd.readouterr().err) == (silent == 0)
    for pulse in pulses:
        pulse.stop()
    del stores


def test_no_thread_outlives_a_pulse():
    """One that came back from the store while Python finalizes would abort the worker."""
    url = f"tcp://127.0.0.1:{free_port()}"
    stores = all_meet([0, 1], 2, url)
    before = threading.active_count()
    for _ in range(20):
        pulse = Pulse(Worker(0, 0, 2, 2, url))  # rank 1 never beats
        pulse.stop()
        assert threading.active_count() <= before
    del stores


RESTARTED = """
import sys
from argparse import Namespace
from agvm_d2.d2.launch import launch, worker_from_environment

args = Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto", resume=False)
launch(lambda args: print("resume:", args.resume), args, worker_from_environment(args))
"""


def alone(script, **env):
    """What it prints and how it ends, in a worker that torchrun has started alone."""
    env = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "AGVM_DIST_TIMEOUT": "60", **env,
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize("count, resume", [("0", False), ("1", True)])
def test_a_restart_by_torchrun_resumes(count, resume):
    out = alone(RESTARTED, TORCHELASTIC_RESTART_COUNT=count)
    assert f"resume: {resume}" in out.stdout, out.stderr


LEAVING = """
import resource
from argparse import Namespace
import torch.distributed as dist
from agvm_d2.d2.launch import launch, worker_from_environment

def main(args):
    print("open files:", resource.getrlimit(resource.RLIMIT_NOFILE))
    if FAILS:
        raise KeyError("its own")

resource.setrlimit(resource.RLIMIT_NOFILE, (200, 500))
args = Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto", resume=False)
try:
    launch(main, args, worker_from_environment(args))
except KeyError:
    pass
print("still a group:", dist.is_initialized())
"""


@pytest.mark.parametrize("fails", [True, False])
def test_a_worker_that_fails_waits_for_nobody(fails):
    """The process group is destroyed by all workers together, or not at all. And rank 0, who has
    files open for each worker, may have as many as the system allows."""
    out = alone(LEAVING.replace("FAILS", str(fails)))
    assert f"still a group: {fails}" in out.stdout, out.stderr
    assert "open files: (500, 500)" in out.stdout
