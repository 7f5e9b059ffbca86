import math
import re
import bad_values
import pytest
from detectron2.config import get_cfg
from toy_d2 import toy_config

from agvm_d2.d2.checks import RANGES, check_config, check_datasets, check_names
from agvm_d2.d2.config import read_config


def test_the_toy_config_is_good(tmp_path):
    check_config(toy_config(tmp_path), 1)


@pytest.mark.parametrize("key, value, said", bad_values.CASES, ids=str)
def test_bad_agvm_values_are_named(key, value, said, tmp_path):
    (tmp_path / "c.yaml").write_text("MODEL: {DEVICE: cpu}")
    key = bad_values.in_yacs(key)
    with pytest.raises(ValueError, match=f"^{re.escape(key)}: {said}"):
        check_config(read_config(str(tmp_path / "c.yaml"), [key, value]), 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"SOLVER__AMP__ENABLED": True}, "SOLVER.AMP.ENABLED: found True, .*CUDA"),
        (
            {"SOLVER__CLIP_GRADIENTS__ITER_RANGE": (20, 10)},
            r"SOLVER.CLIP_GRADIENTS.ITER_RANGE: found \(20, 10\)",
        ),
        ({"SOLVER__IMS_PER_BATCH": 0}, "SOLVER.IMS_PER_BATCH: found 0"),
        (
            {"SOLVER__BETAS": (0.9, 1.0)},
            r"SOLVER.BETAS: found \(0.9, 1.0\), .*two numbers in",
        ),
        ({"SOLVER__BETAS": (0.9,)}, r"SOLVER.BETAS: found \(0.9,\)"),
        ({"SOLVER__EPS": -1e-8}, "SOLVER.EPS: found -1e-08, .*not be negative"),
        ({"SOLVER__MICRO_BATCH_SIZE": -4}, "SOLVER.MICRO_BATCH_SIZE: found -4"),
        ({"SOLVER__MICRO_BATCH_SIZE": 3}, "SOLVER.MICRO_BATCH_SIZE: found 3, .*8 / 1 workers = 8"),
        ({"MODEL__DEVICE": "cuda"}, "MODEL.DEVICE: found 'cuda', .*MODEL.DEVICE cpu"),
    ],
)
def test_bad_values_are_named(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = toy_config(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        check_config(cfg, 1)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("SOLVER.OPTIMIZER", "ADAM", "SGD, ADAMW"),
        ("SOLVER.WARMUP_METHOD", "cubic", "constant, linear, exp"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "global", "full_model"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0, "positive"),
    ],
)
def test_names_are_checked_where_this_package_reads_them(key, value, said, tmp_path):
    cfg = toy_config(tmp_path, **{key.replace(".", "__"): value})
    check_config(cfg, 1)  # a project may build these itself
    with pytest.raises(ValueError, match=f"{key}: found {value!r}, .*{said}"):
        check_names(cfg)


def test_nan_is_in_no_range():
    for key, (holds, _) in RANGES.items():
        if key not in ("SOLVER.STEPS", "SOLVER.BETAS"):
            assert not holds(math.nan), key


def test_a_config_without_our_keys():
    with pytest.raises(ValueError, match="call add_agvm_config"):
        check_config(get_cfg(), 1)


def test_datasets():
    import agvm_d2.data  # noqa: F401

    check_datasets(["digits_train", "digits_val"])  # made on first use
    with pytest.raises(ValueError, match="'digits_trian' is not a registered.*digits_train"):
        check_datasets(["digits_trian"])
    with pytest.raises(FileNotFoundError, match="coco_2017_val.*DETECTRON2_DATASETS"):
        check_datasets(["coco_2017_val"])
