"""The wheel, installed outside the clone: it trains, and has all its commands and configs."""

import os
import shutil
import subprocess
import sys
import venv
import pytest
import torch
from helpers import ROOT, same

from agvm_d2 import model_zoo

CONFIG = "Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml"
LAZY = "Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py"
SHORT = (
    "SOLVER.IMS_PER_BATCH 4 SOLVER.MICRO_BATCH_SIZE 0 SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 1 "
    "SOLVER.STEPS (3,) AGVM.START_ITER 1 AGVM.INTERVAL 1 DATALOADER.NUM_WORKERS 0 "
    "TEST.EXPECTED_RESULTS []"
).split()
# A project of its own: dataset, mapper and training script.
SHAPES = """
import copy
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

def records():
    rng = np.random.default_rng(0)
    found = []
    for i in range(12):
        x, y = (int(v) for v in rng.integers(4, 40, 2))
        pixels = rng.integers(0, 80, (64, 64, 3)).astype(np.uint8)
        pixels[y : y + 16, x : x + 16] = 255
        Image.fromarray(pixels).save(f"shape{i}.png")
        box = {"bbox": [x, y, x + 16, y + 16], "bbox_mode": BoxMode.XYXY_ABS, "category_id": i % 2}
        found.append({"file_name": f"shape{i}.png", "image_id": i, "height": 64, "width": 64,
                      "annotations": [box]})
    return found

DatasetCatalog.register("shapes", records)
MetadataCatalog.get("shapes").thing_classes = ["even", "odd"]

class Noisy:  # draws random numbers for each image, as an augmentation does
    def __call__(self, record):
        record = copy.deepcopy(record)
        pixels = np.asarray(Image.open(record["file_name"])).astype(np.float32)
        pixels = pixels + np.random.normal(0, 5, pixels.shape)
        record["image"] = torch.as_tensor(pixels.transpose(2, 0, 1).copy()).float()
        truth = Instances((64, 64))
        truth.gt_boxes = Boxes([b["bbox"] for b in record["annotations"]])
        truth.gt_classes = torch.tensor([b["category_id"] for b in record["annotations"]])
        record["instances"] = truth
        return record
"""
SCRIPT = """
import sys
from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup
from agvm_d2 import AGVMTrainerMixin, add_agvm_config, model_zoo
import shapes

class YourTrainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=shapes.Noisy())

class Trainer(AGVMTrainerMixin, YourTrainer):
    pass

args = default_argument_parser().parse_args()
args.config_file = model_zoo.get_config_file(args.config_file)
cfg = get_cfg()
add_agvm_config(cfg)
cfg.merge_from_file(args.config_file)
cfg.merge_from_list(args.opts)
default_setup(cfg, args)
trainer = Trainer(cfg)
trainer.resume_or_load(resume=args.resume)
trainer.train()
"""
OWN = (
    "DATASETS.TRAIN ('shapes',) DATASETS.TEST () MODEL.ROI_HEADS.NUM_CLASSES 2 SEED 3 "
    "SOLVER.MICRO_BATCH_SIZE 2 SOLVER.MAX_ITER 6 SOLVER.CHECKPOINT_PERIOD 2 "
    "AGVM.RULE gain AGVM.SCHEDULE iterations AGVM.BASE_BATCH_SIZE 2"
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


@pytest.mark.slow
def test_a_project_outside_the_clone_resumes_bit_for_bit(outside, tmp_path):
    (tmp_path / "shapes.py").write_text(SHAPES)
    (tmp_path / "train.py").write_text(SCRIPT)

    def train(folder, *flags):
        outside(
            "python",
            "train.py",
            "--config-file",
            CONFIG,
            *flags,
            *SHORT,
            *OWN,
            *("OUTPUT_DIR", folder),
        )
        return torch.load(tmp_path / folder / "model_final.pth", weights_only=True)

    whole = train("a")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a/model_0000003.pth", tmp_path / "b")
    (tmp_path / "b/last_checkpoint").write_text("model_0000003.pth")
    resumed = train("b", "--resume")
    same(whole["model"], resumed["model"])
    same(whole["trainer"]["hooks"]["AGVMHook"], resumed["trainer"]["hooks"]["AGVMHook"])
    assert outside("agvm-plot", "b") == "b/agvm.png\n"
    weights = ("MODEL.WEIGHTS", "b/model_final.pth", "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    assert "shapes.png" in outside(
        "agvm-visualize", "--import", "shapes", "--config-file", CONFIG, "--out", "shapes.png",
        "--num", 1, *weights, "DATASETS.TEST", "('shapes',)",
    )  # fmt: skip
    assert "nothing wrong" in outside("agvm-check-data", "--import", "shapes", "shapes")
