"""benchmarks/gpu_check.py, without a GPU: what it says, and that its training is set up rightly."""

import math
import pytest
from helpers import ROOT, finish, start

from agvm_d2.d2.checks import check_config
from agvm_d2.d2.config import read_config
from benchmarks import gpu_check

ON_A_CPU = ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "False"]


def test_without_a_gpu_it_says_so_in_one_line():
    output = finish(start("benchmarks/gpu_check.py", CUDA_VISIBLE_DEVICES=""), ok=False)
    assert output.splitlines()[-1].startswith("gpu_check needs a GPU, and torch ")
    assert "Traceback" not in output


@pytest.mark.parametrize("gpus", [1, 4])
def test_the_config_fits_any_number_of_gpus(gpus):
    cfg = read_config(f"{ROOT}/{gpu_check.CONFIG}", [*gpu_check.options(gpus), *ON_A_CPU])
    check_config(cfg, gpus)
    assert cfg.MODEL.WEIGHTS == "" and cfg.DATASETS.TRAIN == ("digits_train",)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (800,) and cfg.SOLVER.IMS_PER_BATCH == 4 * gpus


def test_a_run_without_factors_or_with_a_bad_loss_is_told():
    factors = {"agvm/lr_scale/backbone": 1.0, "agvm/lr_scale/rpn": 1.2}
    good = [{"total_loss": 2.0, "time": 0.5}, {"total_loss": 1.0, **factors}]
    assert gpu_check.summary(good) == (
        "loss 2.000 -> 1.000, 0.500 s per iteration; factors: backbone 1.000, rpn 1.200"
    )
    with pytest.raises(ValueError, match="measured nothing"):
        gpu_check.summary([{"total_loss": 1.0, "agvm/lr_scale/backbone": 1.0}])
    with pytest.raises(ValueError, match="losses are"):
        gpu_check.summary([{"total_loss": math.nan, **factors}])
