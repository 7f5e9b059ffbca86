"""What several test files share: paths, the command line, files that were written."""

from __future__ import annotations
import importlib.metadata
import json
import os
import subprocess
import sys
import pytest
import torch

from agvm_d2.solver.muon import VERSION

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS = os.path.join(ROOT, "configs")
RCNN_BASE = os.path.join(CONFIGS, "Base-RCNN-FPN-Digits.yaml")
DIGITS = os.path.join(CONFIGS, "Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml")
COCO = os.path.join(CONFIGS, "COCO-Detection/faster_rcnn_R_50_FPN_16ep_bs256_agvm.yaml")
VITDET = os.path.join(CONFIGS, "Digits-InstanceSegmentation/mask_rcnn_vitdet_thin_6ep_bs16_agvm.py")


def needs_muon() -> None:
    """Skip, a module too, where pytorch-optimizer is missing or older than its Muon's groups."""
    pytest.importorskip("pytorch_optimizer")
    found = importlib.metadata.version("pytorch-optimizer")
    if tuple(map(int, found.split(".")[:2])) < VERSION:
        pytest.skip("Muon's groups are those of pytorch-optimizer 4.1", allow_module_level=True)


def start(*command, cwd=ROOT, **env) -> subprocess.Popen:
    """Python with this command line, from the root of the project or another folder."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def finish(process: subprocess.Popen, ok: bool = True) -> str:
    """Its output, once it has ended well, or, not `ok`, with an error."""
    try:
        output = process.communicate(timeout=3600)[0]  # against a hang; no machine is that slow
    finally:
        process.kill()
    assert (process.returncode == 0) == ok, output[-4000:]
    return output


def command(*args, ok=True, **env) -> str:
    """Run train_net.py; its output."""
    return finish(start("train_net.py", *args, **env), ok)


def args(*opts, config=DIGITS, num_gpus=1, eval_only=False):
    """train_net.py's parsed command line."""
    from detectron2.engine import default_argument_parser

    flags = ["--config-file", config, "--num-gpus", str(num_gpus)]
    flags += ["--eval-only"] * eval_only
    return default_argument_parser().parse_args([*flags, *map(str, opts)])


def read(path) -> list[dict]:
    """The rows of a metrics.json."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def agvm_state(checkpoint) -> dict:
    """AGVM's state in a checkpoint's file."""
    return torch.load(checkpoint, weights_only=True)["trainer"]["hooks"]["AGVMHook"]


def same(one, other, path="checkpoint") -> None:
    """Equal bit for bit; names the first place that is not."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other)):
            same(a, b, f"{path}[{i}]")
    else:
        assert one == other, path
