#!/usr/bin/env python
"""What the look at a dataset before training costs.

python benchmarks/dataset_check.py --annotations 100000

writes a COCO file of boxes and polygons of 25 points, 7 an image, and empty image files; prints the
seconds of reading JSON alone, of the whole check, and of the next one, which finds it cached; and
what the looks at each record and mapped sample add to reading an image.
"""

from __future__ import annotations
import argparse
import json
import os
import random
import tempfile
import time
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from agvm_d2.d2.samples import SampleCheck
from agvm_d2.data.check import check
from agvm_d2.data.coco_json import check_json


def make(folder: str, annotations: int) -> str:
    rng = random.Random(0)
    images = max(1, annotations // 7)
    names = [f"{i:06d}.png" for i in range(images)]
    Image.new("L", (640, 480)).save(f"{folder}/{names[0]}")
    for name in names[1:]:
        os.link(f"{folder}/{names[0]}", f"{folder}/{name}")
    boxes = []
    for i in range(annotations):
        x, y = rng.uniform(0, 500), rng.uniform(0, 380)
        mask = [
            round(v + rng.uniform(0, 90), 2)
            for v in (x, y) * 25
        ]  # fmt: skip
        boxes.append(
            {
                "id": i + 1, "image_id": rng.randrange(images), "category_id": 1 + i % 80,
                "iscrowd": 0, "area": 100.0, "bbox": [round(x, 2), round(y, 2), 90.5, 80.25],
                "segmentation": [mask],
            }
        )  # fmt: skip
    path = os.path.join(folder, "instances.json")
    with open(path, "w") as file:
        file.write(
            json.dumps(
                {
                    "images": [
                        {"id": i, "file_name": name, "width": 640, "height": 480}
                        for i, name in enumerate(names)
                    ],
                    "annotations": boxes,
                    "categories": [{"id": i + 1, "name": str(i)} for i in range(80)],
                }
            )
        )
    return path


def seconds(function, *args) -> dict[str, float]:
    """Of the clock and of this process; the best of three."""
    runs = []
    for _ in range(3):
        clock, own = time.perf_counter(), time.process_time()
        function(*args)
        runs.append((time.perf_counter() - clock, time.process_time() - own))
    return dict(zip(("wall", "cpu"), map(min, zip(*runs, strict=True)), strict=True))


def read(path: str) -> None:
    with open(path, "rb") as file:
        json.loads(file.read())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        path = make(folder, args.annotations)
        register_coco_instances("benchmark", {}, path, folder)
        report, _ = check_json(path, folder)
        assert not report.faults, report.errors() + report.warnings()
        result = {
            "megabytes": os.path.getsize(path) / 1e6,
            "json": seconds(read, path),
            "check": seconds(check_json, path, folder),
        }
        check("benchmark")
        result["cached"] = seconds(check, "benchmark")
        dicts = DatasetCatalog.get("benchmark")[:1000]
        looks = SampleCheck(things=80)
        each = seconds(lambda: [looks.record(d) for d in dicts])["cpu"] / len(dicts)
        result["record_microseconds"] = each * 1e6
        labels = {"sem_seg": torch.randint(0, 19, (1024, 2048))}
        looks = SampleCheck(stuff=19)
        result["labels_2_megapixels_milliseconds"] = (
            seconds(lambda: [looks.sample(labels, {}) for _ in range(20)])["cpu"] / 20 * 1e3
        )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
