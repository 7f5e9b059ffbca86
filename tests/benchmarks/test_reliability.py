"""benchmarks/reliability.py, in small; and that it sees what is lost."""

import os
import random
import subprocess
import sys
from pathlib import Path
import pytest

from agvm_d2.d2.checkpoint import AtomicCheckpointer
from benchmarks import reliability

pytestmark = pytest.mark.integration  # processes of their own

ROOT = Path(__file__).resolve().parents[2]


def test_killed_while_saving():
    result = reliability.saves(4, random.Random(1))
    assert result["whole_files_read"] >= 4 and result["lost"] == 0


class Torn(AtomicCheckpointer):
    """One of three files is cut short."""

    def _write(self, path, write, check=None):  # nor is it read back
        super()._write(
            path, lambda f: write(f) if "_0_0" not in path else f.write(b"PK\3\4 and no more")
        )


class Removed(AtomicCheckpointer):
    """What an earlier process saved is removed."""

    def _write(self, path, write, check=None):
        super()._write(path, write)
        start = os.path.join(self.save_dir, "model_start.pth")
        if "_0_" in path and os.path.exists(start):
            os.remove(start)


class Untagged(AtomicCheckpointer):
    """`last_checkpoint` stays at the first."""

    def tag_last_checkpoint(self, last_filename_basename):
        if not os.path.exists(os.path.join(self.save_dir, "last_checkpoint")):
            super().tag_last_checkpoint(last_filename_basename)


@pytest.mark.parametrize("careless", [Torn, Removed, Untagged])
def test_what_is_lost_is_counted(careless):
    assert reliability.saves(1, random.Random(1), careless)["lost"] == 1


@pytest.mark.slow
def test_a_killed_worker_ends_the_job_and_the_run_resumes(digits):
    result = reliability.workers(2, random.Random(1))
    assert result["resumed_from_the_last_checkpoint"] == 1 and result["lost"] == 0
    assert result["seconds_to_the_end"]["max"] < 60


@pytest.mark.slow
def test_memory_and_files_do_not_grow_beyond_detectron2s_own():
    result = reliability.long(3000, random.Random(0))
    for rank in ("rank0", "rank1"):
        agvm, plain = (result[kind][rank] for kind in ("agvm", "plain"))
        assert agvm["open_files"][0] == agvm["open_files"][1]
        # About 1 kB a step is what Detectron2's EventStorage keeps, a little more with AGVM's
        # scalars; a tensor of 64 floats kept in each step would be 0.5 kB more than that.
        more = agvm["growth_kB_per_1000_steps"] - plain["growth_kB_per_1000_steps"]
        assert more < 400 + 3 * (agvm["standard_error"] + plain["standard_error"])


def test_a_worker_that_fails_is_named(digits, tmp_path):
    options = (
        "SOLVER.IMS_PER_BATCH 4 SOLVER.MICRO_BATCH_SIZE 0 DATALOADER.NUM_WORKERS 0 "
        "SOLVER.BASE_LR 1e30 SOLVER.CLIP_GRADIENTS.ENABLED False SOLVER.WARMUP_ITERS 0 "
        f"SOLVER.MAX_ITER 40 OUTPUT_DIR {tmp_path}"
    )
    flags = ["--config-file", reliability.CONFIG, "--num-gpus", "2", "--dist-url", "auto"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "train_net.py", *flags, *options.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode and "FloatingPointError" in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: worker ") and "--resume" in last
