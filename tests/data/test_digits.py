import hashlib
import json
import multiprocessing
import os
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from agvm_d2.data import digits as data

SMALL = {"train": 12, "val": 6}


def digest(folder) -> str:
    found = hashlib.sha256()
    for path, _, files in sorted(os.walk(folder)):
        for name in sorted(files):
            found.update(name.encode())
            with open(os.path.join(path, name), "rb") as f:
                found.update(f.read())
    return found.hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "digits"
    data.make(str(folder), SMALL)
    return folder


def test_it_is_registered_and_loads(digits):
    meta = MetadataCatalog.get("digits_val")
    assert meta.thing_classes == list("0123456789") and meta.evaluator_type == "coco"
    records = DatasetCatalog.get("digits_val")
    assert len(records) == 8 and records[0]["height"] == records[0]["width"] == 96
    assert os.path.isfile(records[0]["file_name"])
    assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(10))


def test_it_is_deterministic(made, tmp_path):
    data.make(str(tmp_path / "again"), SMALL)
    assert digest(made) == digest(tmp_path / "again")


def test_boxes_and_polygons_bound_the_same_pixels(made):
    from pycocotools.coco import COCO

    for split, num in SMALL.items():
        coco = COCO(str(made / "annotations" / f"instances_{split}.json"))
        assert len(coco.getImgIds()) == num
        for annotation in coco.loadAnns(coco.getAnnIds()):
            x, y, w, h = annotation["bbox"]
            assert 0 <= x and 0 <= y and x + w <= 96 and y + h <= 96 and w > 3 and h > 3
            rows, columns = np.nonzero(coco.annToMask(annotation))
            assert abs(columns.min() - x) <= 1 and abs(columns.max() + 1 - x - w) <= 1
            assert abs(rows.min() - y) <= 1 and abs(rows.max() + 1 - y - h) <= 1
            assert len(rows) >= 0.8 * annotation["area"]  # holes are filled in polygons


def test_train_and_val_share_no_source(tmp_path, monkeypatch):
    """By what is drawn from, as bytes: the handwriting and the photographs' columns."""
    from sklearn.datasets import load_digits

    given = []

    def draw(rng, sources, size):
        given.append(sources)
        return real(rng, sources, size)

    real = data.draw
    monkeypatch.setattr(data, "draw", draw)
    data.make(str(tmp_path / "digits"), {"train": 1, "val": 1})
    (train_photos, train), (val_photos, val) = given
    sources = load_digits()
    assert len(train) == data.TRAIN_DIGITS and len(train) + len(val) == len(sources.images)
    assert [label for _, label in train + val] == sources.target.tolist()
    assert not {g.tobytes() for g, _ in train} & {g.tobytes() for g, _ in val}
    for one, other in zip(train_photos, val_photos, strict=True):
        columns = [{p[:, i].tobytes() for i in range(p.shape[1])} for p in (one, other)]
        assert len(columns[0]) > 3 * len(columns[1]) - 10 > 100  # three quarters and one
        assert not columns[0] & columns[1]


def test_pictures_are_96_pixel_rgb(made):
    picture = np.asarray(Image.open(made / "train" / "000001.png"))
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8 and picture.std() > 5


def test_an_interrupted_first_use_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "datasets" / "digits"
    real, calls = data.draw, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 15:  # in the second split
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(data, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.make(str(folder), SMALL)
    assert [p.name for p in folder.parent.iterdir()] == ["digits.lock"]
    monkeypatch.setattr(data, "draw", real)
    data.make(str(folder), SMALL)
    assert folder.is_dir()


def test_parallel_first_uses_make_one(made, tmp_path):
    folder = tmp_path / "digits"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=data.make, args=(str(folder), SMALL)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert digest(folder) == digest(made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits", "digits.lock"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be made in .*DETECTRON2_DATASETS"):
        data.make(str(tmp_path / "file" / "digits"), SMALL)


def test_annotations_are_in_coco_format(made):
    coco = json.loads((made / "annotations" / "instances_val.json").read_text())
    assert [c["name"] for c in coco["categories"]] == list("0123456789")
    ids = [a["id"] for a in coco["annotations"]]
    assert len(set(ids)) == len(ids)
