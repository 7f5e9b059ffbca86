"""Malformed configs, drawn at random: each ends in one error that names a key."""

import random
import bad_values
import pytest
from helpers import DIGITS, args

import train_net

NUM = 600
AGVM = {
    bad_values.in_yacs(key): [repr(value) for value in values]
    for key, values in bad_values.BAD.items()
}
NUMBERS = ["-1", "-0.5", "'x'", "()", "None", "True", "(1, 2)", "[]"]
# key -> values that cannot be used, whatever the others are.
BAD = {
    **AGVM,
    "AGVM.ENABLED": ["2", "'yes'", "None"],
    "SOLVER.OPTIMIZER": ["ADAM", "1", "()"],
    "SOLVER.MICRO_BATCH_SIZE": ["-4", "3", "5", "1000", "'x'", "2.5"],
    "SOLVER.IMS_PER_BATCH": ["0", "-8", "'x'", "7.5", "()"],
    "SOLVER.REFERENCE_WORLD_SIZE": ["7", "'x'"],
    "SOLVER.WARMUP_METHOD": ["cubic", "3"],
    "SOLVER.WARMUP_ITERS": NUMBERS[:5],
    "SOLVER.WARMUP_FACTOR": ["0.0", "-0.1", "1.5", "'x'", "nan"],
    "SOLVER.MAX_ITER": ["0", "-3", "'x'", "1.5", "()"],
    "SOLVER.BASE_LR": ["0.0", "-0.1", "nan", "inf", "'x'", "()"],
    "SOLVER.MOMENTUM": ["1.0", "-0.5", "nan", "'x'"],
    "SOLVER.BETAS": ["(0.9,)", "(0.9, 1.0)", "(-0.1, 0.999)", "('a', 'b')", "0.9", "(0.9, nan)"],
    "SOLVER.EPS": ["-1e-8", "nan", "inf", "'x'", "()"],
    "SOLVER.WEIGHT_DECAY": ["-0.1", "nan", "inf", "'x'"],
    "SOLVER.GAMMA": ["0.0", "-1.0", "2.0", "'x'"],
    "SOLVER.STEPS": ["(5, 3)", "(-1,)", "(2, 2)", "('a',)", "7", "(1.5,)"],
    "SOLVER.CHECKPOINT_PERIOD": ["0", "-1", "'x'"],
    "SOLVER.LR_SCHEDULER_NAME": ["Warmup", "5"],
    "SOLVER.ON_NONFINITE": ["ignore", "0"],
    "SOLVER.AMP.ENABLED": ["True", "1", "'x'"],
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ["global", "2"],
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ["0.0", "-1.0", "nan", "'x'"],
    "SOLVER.CLIP_GRADIENTS.ITER_RANGE": ["(5, 3)", "(1,)", "('a', 'b')", "4", "(1, 2, 3)"],
    "DATALOADER.NUM_WORKERS": ["-1", "'x'", "1.5"],
    "DATALOADER.ON_BAD_IMAGE": ["ignore", "0"],
    "DATALOADER.SAMPLER_TRAIN": ["Sampler", "1"],
    "DATASETS.TRAIN": ["()", "('digit_train',)", "(1,)", "('coco_2017_train',)"],
    "DATASETS.TEST": ["('no_such',)", "('ade20k_sem_seg_val',)"],
    "MODEL.DEVICE": ["cuda", "3", "gpu"],
    "MODEL.WEIGHTS": ["no/such.pth", "3"],
    "MODEL.META_ARCHITECTURE": ["RCNN", "1"],
    "MODEL.BACKBONE.NAME": ["resnet", "1"],
    "OUTPUT_DIR": ["/dev/null/x", "3"],
    "TEST.EVAL_PERIOD": ["-1", "'x'"],
    "AGVM.INTERVALL": ["3"],
    "SOLVR.BASE_LR": ["0.1"],
    "SOLVER.CLIP_GRADIENTS": ["3"],
    "MODEL": ["3"],
}


def malformed(rng: random.Random) -> tuple[list[str], list[str]]:
    """Options with one to three bad values among good ones; and the bad ones' keys."""
    keys = rng.sample(sorted(BAD), rng.randint(1, 3))
    options = ["DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "20"]
    for key in keys:
        options += [key, rng.choice(BAD[key])]
    return options, keys


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def check(options, keys, num_gpus=1):
    try:
        train_net.setup(args(*options, num_gpus=num_gpus))
    except (ValueError, KeyError, OSError) as error:
        message = str(error.args[0] if len(error.args) == 1 else error)
        named = [key for key in keys if key in message or key.split(".")[0] + ":" in message]
        # A wrong type may be found at the parent: "SOLVER".
        assert named, f"{options}: {message}"
        assert len(message) < 1000 and "Traceback" not in message
    else:
        raise AssertionError(f"nothing was wrong with {options}")


@pytest.mark.parametrize("key", sorted(BAD))
def test_each_bad_value_alone(key, tmp_path):
    for value in BAD[key]:
        check(["OUTPUT_DIR", str(tmp_path / "out"), key, value], [key])


def test_malformed_configs_by_the_hundred(tmp_path):
    rng = random.Random(0)
    for _ in range(NUM):
        options, keys = malformed(rng)
        check(["OUTPUT_DIR", str(tmp_path / "out"), *options], keys)


def test_numbers_of_workers():
    for num_gpus in (3, 5, 128):
        with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH"):
            train_net.setup(args(num_gpus=num_gpus, config=DIGITS))
