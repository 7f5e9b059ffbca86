import pytest
from detectron2.config import get_cfg
from toy import toy_config

from agvm_d2.d2.checks import check_config, check_datasets, check_names
from agvm_d2.d2.config import add_agvm_config, read_config
from agvm_d2.d2.micro_batches import micro_batches

PATTERNS = "AGVM__MODULES"


def test_read_config_takes_values_that_are_not_strings(tmp_path):
    (tmp_path / "c.yaml").write_text("SEED: 1")
    cfg = read_config(str(tmp_path / "c.yaml"), ["SEED", 2, "SOLVER.STEPS", (3,)])
    assert (cfg.SEED, cfg.SOLVER.STEPS) == (2, (3,))


def test_a_projects_own_optimizer_key_is_kept():
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    add_agvm_config(cfg)
    assert cfg.SOLVER.OPTIMIZER == "ADAMW"


def test_the_toy_config_is_good(tmp_path):
    check_config(toy_config(tmp_path), 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"AGVM__MODE": "on"}, "AGVM.MODE: found 'on', .* modulate, monitor"),
        ({"AGVM__ESTIMATOR": "pair"}, "AGVM.ESTIMATOR: found 'pair', .* pairwise, split"),
        ({"AGVM__RULE": "agvm"}, "AGVM.RULE: found 'agvm', .* variance, gain"),
        ({"AGVM__BASE_BATCH_SIZE": 0}, "AGVM.BASE_BATCH_SIZE: found 0, .*at least 1"),
        ({"AGVM__INTERVAL": 0}, "AGVM.INTERVAL: found 0, .*at least 1"),
        ({"AGVM__START_ITER": -2}, "AGVM.START_ITER: found -2"),
        ({"SOLVER__AMP__ENABLED": True}, "SOLVER.AMP.ENABLED: found True, .*CUDA"),
        ({"AGVM__STOP_ITER": -3}, "AGVM.STOP_ITER: found -3"),
        ({"AGVM__MOMENTUM": 1.0}, r"AGVM.MOMENTUM: found 1.0, .*\[0, 1\)"),
        ({"AGVM__RATIO_RANGE": (2.0, 10.0)}, r"AGVM.RATIO_RANGE: found \(2.0, 10.0\)"),
        ({"AGVM__RATIO_RANGE": (0.5,)}, r"AGVM.RATIO_RANGE: found \(0.5,\)"),
        ({"AGVM__RATIO_RANGE": ("a", "b")}, "AGVM.RATIO_RANGE: found .'a', 'b'."),
        ({PATTERNS: ("backbone",)}, "AGVM.MODULES: found .'backbone',., .*pairs"),
        ({PATTERNS: (("a", "b", "c"),)}, "AGVM.MODULES: found ..'a', 'b', 'c'.,., .*pairs"),
        ({PATTERNS: (("rpn", "("),)}, r"AGVM.MODULES: '\(' of module 'rpn' is not a regex"),
        (
            {"SOLVER__CLIP_GRADIENTS__ITER_RANGE": (20, 10)},
            r"SOLVER.CLIP_GRADIENTS.ITER_RANGE: found \(20, 10\)",
        ),
        ({"SOLVER__IMS_PER_BATCH": 0}, "SOLVER.IMS_PER_BATCH: found 0"),
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
    "options, message",
    [
        ({"SOLVER__OPTIMIZER": "ADAM"}, "SOLVER.OPTIMIZER: found 'ADAM', .*SGD, ADAMW"),
        ({"SOLVER__WARMUP_METHOD": "cubic"}, "SOLVER.WARMUP_METHOD: found 'cubic'"),
        (
            {"SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "global"},
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE: found 'global', .*full_model",
        ),
        (
            {"SOLVER__CLIP_GRADIENTS__CLIP_VALUE": 0.0},
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE: found 0.0",
        ),
    ],
)
def test_names_are_checked_where_this_package_reads_them(tmp_path, options, message):
    cfg = toy_config(tmp_path, **options)
    check_config(cfg, 1)  # a project may build these itself
    with pytest.raises(ValueError, match=message):
        check_names(cfg)


def test_a_batch_that_workers_cannot_share(tmp_path):
    cfg = toy_config(tmp_path)
    with pytest.raises(ValueError, match="IMS_PER_BATCH: found 8, .*number of workers, 3"):
        check_config(cfg, 3)
    cfg.SOLVER.MICRO_BATCH_SIZE = 4
    with pytest.raises(ValueError, match="MICRO_BATCH_SIZE: found 4, .*8 / 4 workers = 2"):
        check_config(cfg, 4)


@pytest.mark.parametrize("micro, workers, passes", [(0, 1, 1), (8, 1, 1), (2, 1, 4), (2, 2, 2)])
def test_micro_batches(tmp_path, micro, workers, passes):
    assert micro_batches(toy_config(tmp_path, SOLVER__MICRO_BATCH_SIZE=micro), workers) == passes


def test_a_config_without_our_keys():
    from detectron2.config import get_cfg

    with pytest.raises(ValueError, match="call add_agvm_config"):
        check_config(get_cfg(), 1)


def test_datasets():
    import agvm_d2.data  # noqa: F401

    check_datasets(["digits_train", "digits_val"])  # made on first use
    with pytest.raises(ValueError, match="'digits_trian' is not a registered.*digits_train"):
        check_datasets(["digits_trian"])
    with pytest.raises(FileNotFoundError, match="coco_2017_val.*DETECTRON2_DATASETS"):
        check_datasets(["coco_2017_val"])
