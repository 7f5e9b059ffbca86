"""The wheel, installed outside the clone: it trains, and has all its commands and configs."""

import os
import shutil
import subprocess
import sys
import venv
import pytest
from helpers import ROOT

from agvm_d2 import model_zoo

CONFIG = "Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml"
LAZY = "Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py"
SHORT = (
    "SOLVER.IMS_PER_BATCH 4 SOLVER.MICRO_BATCH_SIZE 0 SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 1 "
    "SOLVER.STEPS (3,) AGVM.START_ITER 1 AGVM.INTERVAL 1 DATALOADER.NUM_WORKERS 0 "
    "TEST.EXPECTED_RESULTS []"
).split()
SOURCES = ("agvm_d2", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command, ok=True, **options):
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        **options,
    )
    assert (done.returncode == 0) == ok, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def bin(tmp_path_factory):
    """The commands of a new environment with the wheel, and else with what this one has."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = os.path.join(ROOT, name)
        copy = shutil.copytree if os.path.isdir(source) else shutil.copy
        copy(source, folder / "source" / name if name == "agvm_d2" else folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", folder / "source", "--no-deps", "--no-build-isolation", "-w", folder)
    (wheel,) = folder.glob("agvm_d2-*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    # Only now, or pip would find this package there. A .pth file's folders are not searched for
    # more of them, so an editable clone among them stays out.
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others))
    return folder / "venv/bin"


@pytest.fixture
def outside(bin, digits, tmp_path):
    """Call a command of the wheel, outside the clone."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"DETECTRON2_DATASETS": digits, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def call(command, *args, ok=True):
        return run(bin / command, *args, ok=ok, cwd=tmp_path, env=env)

    return call


@pytest.mark.slow
def test_the_wheel_trains_in_two_workers_and_its_commands_work(outside, bin, tmp_path):
    where = outside("python", "-c", "import agvm_d2; print(agvm_d2.__file__)")
    assert where.startswith(str(bin.parent))
    assert outside("agvm-configs").splitlines() == model_zoo.names()

    two = ("--num-gpus", 2, "--dist-url", "auto", "--config-file")
    out = outside("python", "-m", "agvm_d2.train", *two, CONFIG, *SHORT, "OUTPUT_DIR", "out")
    assert "Evaluation results for bbox" in out
    flags = (*two, f"configs/{CONFIG}", "--resume")
    out = outside("agvm-train", *flags, *SHORT, "SOLVER.MAX_ITER", 5, "OUTPUT_DIR", "out")
    assert "Starting training from iteration 4" in out

    assert outside("agvm-plot", "out") == "out/agvm.png\n" and (tmp_path / "out/agvm.png").exists()
    weights = ("MODEL.WEIGHTS", "out/model_final.pth")
    assert "found.png" in outside(
        "agvm-visualize", "--config-file", CONFIG, "--out", "found.png", "--num", 1, *weights
    )
    assert "BASE_BATCH_SIZE: 64" in outside(
        "agvm-recipe", "--config-file", CONFIG, "--batch-size", 128, "--rule", "gain"
    )
    for config in (CONFIG, LAZY):
        assert "backbone" in outside("agvm-modules", "--config-file", config)
    assert "nothing wrong" in outside("agvm-check-data", "digits_val")
    assert "agvm_d2.plan: error" in outside("agvm-plan", "none", "--batches", 8, ok=False)
    assert "agvm_d2.data.ade20k: error" in outside("agvm-ade20k", "none", ok=False)
    out = outside("agvm-train", "--config-file", "Digits.yaml", ok=False)
    assert out.splitlines()[-1].startswith("agvm_d2.train: error: --config-file: 'Digits.yaml' is")
