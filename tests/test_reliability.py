"""benchmarks/reliability.py, in small: its own assertions are the test."""

import random
import sys
import pytest
from test_train_net import ROOT, command

sys.path.insert(0, ROOT)
from benchmarks import reliability


def test_killed_while_saving():
    result = reliability.saves(4, random.Random(1))
    assert result["whole_files_read"] >= 4 and result["lost"] == 0


@pytest.mark.slow
def test_a_killed_worker_ends_the_job_and_the_run_resumes(digits):
    result = reliability.workers(2, random.Random(1))
    assert result["resumed_from_the_last_checkpoint"] == 1
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
    config = "configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml"
    out = command(
        "--config-file", f"{ROOT}/{config}", "--num-gpus", 2, "--dist-url", "auto",
        "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MICRO_BATCH_SIZE", 0, "DATALOADER.NUM_WORKERS", 0,
        "SOLVER.BASE_LR", "1e30", "SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.WARMUP_ITERS", 0,
        "SOLVER.MAX_ITER", 40, "OUTPUT_DIR", tmp_path, ok=False,
    )  # fmt: skip
    assert "FloatingPointError" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: worker ") and "--resume" in last
