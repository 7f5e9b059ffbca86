"""The digits twins: every pipeline trains, evaluates and meets its TEST.EXPECTED_RESULTS."""

import glob
import os
import pytest
from helpers import ROOT, command

TWINS = [
    os.path.relpath(path, ROOT)
    for path in sorted(glob.glob(os.path.join(ROOT, "configs", "Digits-*", "*")))
    if path.endswith(("_agvm.yaml", "_agvm.py"))
]
# In `make test` too: the fastest.
FAST = "semantic_fpn"


@pytest.fixture(scope="module")
def full_digits(tmp_path_factory):
    return str(tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize(
    "path",
    [p if FAST in p else pytest.param(p, marks=pytest.mark.slow) for p in TWINS],
)
def test_twins(path, full_digits, tmp_path):
    if path.endswith(".py"):
        pytest.importorskip("timm")
        output = f"train.output_dir={tmp_path}"
    else:
        output = f"OUTPUT_DIR {tmp_path}"
    if "panoptic" in path:
        pytest.importorskip("panopticapi")
    out = command(
        "--config-file", os.path.join(ROOT, path), *output.split(), DETECTRON2_DATASETS=full_digits
    )
    # verify_results ends the command with an error where a result is off.
    assert "Results verification passed" in out or "_bs64_agvm" in path and "8ep" not in path
