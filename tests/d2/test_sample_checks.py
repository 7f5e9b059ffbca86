"""What is looked at when an image is read: records before the mapper, samples after it."""

import copy
import itertools
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import Boxes, BoxMode, Instances, Keypoints, PolygonMasks
from PIL import Image

from agvm_d2.d2.handover import pack, pack_shared, packer, unpacked
from agvm_d2.d2.loader import BadImageError, ResumableLoader
from agvm_d2.d2.samples import SampleCheck

NAN, INF = float("nan"), float("inf")
WIDTH, HEIGHT = 40, 30


def records(folder, num=4, **annotation):
    """Images with one object each; `annotation` changes that of the third image."""
    found = []
    for i in range(num):
        path = folder / f"{i}.png"
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
        found.append(
            {
                "file_name": str(path),
                "width": WIDTH,
                "height": HEIGHT,
                "annotations": [
                    {
                        "bbox": [2.0, 3.0, 10.0, 8.0],
                        "bbox_mode": BoxMode.XYWH_ABS,
                        "category_id": 1,
                        "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]],
                    }
                ],
            }
        )
    if num > 2:
        found[2]["annotations"][0].update(annotation)
    return found


def loader(dicts, mapper=None, **options):
    check = SampleCheck.of((), mapper) if mapper else SampleCheck(things=2)
    mapper = mapper or DatasetMapper(
        is_train=True, augmentations=[], image_format="RGB", use_instance_mask=True
    )
    options = {"check": check, "grouping": False, **options}
    size = len(dicts)
    return ResumableLoader(
        dicts, mapper, 2, lambda seed: TrainingSampler(size, seed=seed), **options
    )


def read(loader, num=4):
    return [d for batch in itertools.islice(iter(loader), num) for d in batch]


ANNOTATIONS = [
    ("bbox", [1, NAN, 3, 4], "finite"),
    ("bbox", [1, 2, INF, 4], "finite"),
    ("bbox", [1, 2, 1e9, 4], "at most 400 away"),
    ("bbox", [9, 9, -3, 4], "negative width"),
    ("bbox", ["a", 9, 3, 4], "finite"),
    ("category_id", 2, "from 0 to 1"),
    ("category_id", -1, "from 0 to 1"),
    ("segmentation", [[1, 2, NAN, 4, 5, 6]], "finite"),
    ("segmentation", [[1, 2, INF, 4, 5, 6]], "finite"),
    ("segmentation", [[1, 2, 1e9, 4, 5, 6]], "at most 400 away"),
    ("segmentation", [[1, 2, -1e9, 4, 5, 6]], "at most 400 away"),
    ("segmentation", [np.array([1, 2, NAN, 4, 5, 6])], "finite"),
    ("segmentation", [[1, 2, 3, 4]], "three points"),
    ("segmentation", [[1, 2, 3, 4, 5, 6, 7]], "three points"),
    ("segmentation", {"size": [40, 30], "counts": [1200]}, "image's size"),
    ("segmentation", {"size": [30, 40], "counts": b"0000"}, "cover the image"),
    ("segmentation", {"size": [30, 40], "counts": b"\xff\xfe"}, "cover the image"),
    ("keypoints", [1, NAN, 2], "finite"),
]


@pytest.mark.parametrize("field, value, words", ANNOTATIONS)
def test_a_bad_annotation_never_gets_to_the_mapper(field, value, words, tmp_path):
    """pycocotools dies of a NaN or a huge coordinate, without a word."""
    seen = []

    def mapper(record):
        seen.append(record["file_name"])
        return {"image": torch.zeros(3, HEIGHT, WIDTH)}

    dicts = records(tmp_path, **{field: value})
    bad = f"'{tmp_path}/2.png': ValueError: annotation 0: {field}: found "
    with pytest.raises(BadImageError, match=words) as caught:
        read(loader(dicts, mapper, check=SampleCheck(things=2)))
    assert bad in str(caught.value) and "ON_BAD_IMAGE skip" in str(caught.value)
    found = read(loader(dicts, mapper, check=SampleCheck(things=2), on_bad_image="skip"))
    assert len(found) == 8 and f"{tmp_path}/2.png" not in seen


@pytest.mark.parametrize("num_workers", [0, 1])
def test_detectron2s_mapper_is_kept_from_it_too(num_workers, tmp_path, d2_log):
    dicts = records(tmp_path, segmentation=[[1, 2, 1e9, 4, 5, 6]])
    with pytest.raises(BadImageError, match="2.png': ValueError: annotation 0: segmentation"):
        read(loader(dicts, num_workers=num_workers))
    assert len(read(loader(dicts, num_workers=num_workers, on_bad_image="skip"))) == 8
    assert "Skipped image 1 of this worker so far: " in d2_log.text


def test_good_records_pass(tmp_path):
    dicts = records(tmp_path, bbox=[-3.0, 2.0, 50.0, 4.0])
    assert len(read(loader(dicts))) == 8
    rotated = {"bbox": [9, 9, -4, 5, 30.0], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0}
    SampleCheck(things=2).record({**dicts[0], "annotations": [rotated]})


def instances(**fields):
    made = Instances((HEIGHT, WIDTH))
    made.gt_boxes = Boxes(torch.tensor([[1.0, 2.0, 8.0, 9.0]]))
    made.gt_classes = torch.tensor([1])
    for name, value in fields.items():
        made.remove(name) if made.has(name) else None
        made.set(name, value)
    return made


IMAGE = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
SAMPLES = [
    (
        {"instances": instances(gt_boxes=Boxes(torch.tensor([[1, NAN, 2, 3]])))},
        "gt_boxes: found nan",
    ),
    (
        {"instances": instances(gt_boxes=Boxes(torch.tensor([[1, 2, 1e9, 3]])))},
        "gt_boxes: found 1e",
    ),
    ({"instances": instances(gt_classes=torch.tensor([3]))}, "gt_classes: found 3, .*below 3"),
    (
        {"instances": instances(gt_masks=PolygonMasks([[np.array([1, 2, 3, INF, 5, 6])]]))},
        "gt_masks: found inf",
    ),
    (
        {"instances": instances(gt_keypoints=Keypoints([[[1.0, NAN, 2.0]]]))},
        "gt_keypoints: found nan",
    ),
    ({"sem_seg": torch.full((HEIGHT, WIDTH), 12)}, "l.png': found label 12, .* below 4"),
    ({"sem_seg": torch.full((HEIGHT, WIDTH), -1)}, "l.png': found label -1"),
    ({"sem_seg": torch.zeros(WIDTH, HEIGHT, dtype=torch.long)}, "l.png': labels .40, 30. for an"),
]


@pytest.mark.parametrize("fields, message", SAMPLES)
def test_a_bad_sample_of_a_projects_own_mapper(fields, message, tmp_path):
    dicts = records(tmp_path)
    for record in dicts:
        record["sem_seg_file_name"] = "l.png"

    def mapper(record):
        return {"image": IMAGE, **copy.deepcopy(fields)}

    with pytest.raises(
        BadImageError, match=f"0-3].png': ValueError: .*{message}".replace("0-", ".*[0-")
    ):
        read(loader(dicts, mapper, check=SampleCheck(things=3, stuff=4)))


def test_good_samples_pass():
    check = SampleCheck(things=3, stuff=4, ignore=255)
    labels = torch.tensor([[0, 3, 255]] * HEIGHT).repeat(1, WIDTH)[:, :WIDTH]
    check.sample({"image": IMAGE, "instances": instances(), "sem_seg": labels}, {})
    check.sample({"image": IMAGE, "instances": Instances((HEIGHT, WIDTH))}, {})
    check.sample({"image": torch.zeros(6), "target": 3}, {})
    check.sample([1, 2], {})
    SampleCheck().sample({"image": IMAGE, "sem_seg": labels + 1000}, {})  # classes not known


# Files


def write(mode, **options):
    return lambda path: Image.new(mode, (WIDTH, HEIGHT)).save(path, **options)


@pytest.mark.parametrize(
    "save, message",
    [
        (write("I;16"), "I;16: more than 8 bits"),
        (write("F", format="TIFF"), "mode F: more than 8 bits"),
    ],
)
def test_a_file_that_reading_would_spoil(save, message, tmp_path):
    dicts = records(tmp_path)
    save(tmp_path / "2.png")
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    with pytest.raises(BadImageError, match=f"2.png': ValueError: .*{message}"):
        read(loader(dicts, mapper))
    # A project's own mapper may know how.
    own = loader(dicts, lambda record: {"image": IMAGE})
    assert len(read(own)) == 8


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_odd_file_is_named(num_workers, tmp_path, d2_log):
    dicts = records(tmp_path)
    write("CMYK", format="JPEG")(tmp_path / "2.png")
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    found = read(loader(dicts, mapper, num_workers=num_workers), 30)
    assert not any(key.startswith("agvm_d2") for sample in found for key in sample)
    assert "Odd image: " in d2_log.text and "2.png': mode CMYK" in d2_log.text
    assert d2_log.text.count("Odd image") == 10
    assert "the next ones are not named" in d2_log.text


@pytest.mark.parametrize(
    "save, message",
    [
        (write("P", format="PNG"), "labels/2.png': mode P"),
        (write("I;16", format="PNG"), "labels/2.png': mode I;16"),
        (
            lambda path: Image.new("L", (HEIGHT, WIDTH)).save(path),
            "labels/2.png': 30 x 40, but the image is 40 x 30",
        ),
        (
            lambda path: Image.new("L", (WIDTH, HEIGHT), 9).save(path),
            "labels/2.png': found label 9",
        ),
        (lambda path: path.write_text("x"), "UnidentifiedImageError.*labels/2.png|labels/2.png"),
        (lambda path: path.unlink(), "labels/2.png"),
    ],
)
def test_a_bad_label_file(save, message, tmp_path):
    (tmp_path / "labels").mkdir()
    dicts = records(tmp_path)
    for i, record in enumerate(dicts):
        path = tmp_path / "labels" / f"{i}.png"
        Image.new("L", (WIDTH, HEIGHT), 255 if i else 2).save(path)
        record["sem_seg_file_name"] = str(path)
        del record["annotations"]
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    check = SampleCheck(stuff=3, files=True)
    assert len(read(loader(dicts, mapper, check=check))) == 8
    save(tmp_path / "labels" / "2.png")
    with pytest.raises(BadImageError, match=message):
        read(loader(dicts, mapper, check=check))


def test_codes_under_polygons_are_told_the_way_out(tmp_path):
    dicts = records(tmp_path, segmentation={"size": [HEIGHT, WIDTH], "counts": b"Yo0W2"})
    from agvm_d2.data.annotations import rle_pixels

    dicts[2]["annotations"][0]["segmentation"]["counts"] = counts = _code()
    assert rle_pixels(counts) == WIDTH * HEIGHT
    with pytest.raises(BadImageError, match="INPUT.MASK_FORMAT bitmask"):
        read(loader(dicts))


def _code():
    import pycocotools.mask as mask_util

    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[3:9, 4:20] = 1
    return mask_util.encode(mask)["counts"]


# From a loader's process


def test_samples_arrive_as_they_left():
    sample = {
        "image": IMAGE,
        "view": torch.arange(12).reshape(3, 4).t(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "instances": instances(gt_masks=PolygonMasks([[np.arange(6.0)]])),
        "none": None,
        "name": "a.png",
    }
    for how in (pack, pack_shared):
        (back,) = unpacked([how(sample)])
        for key in ("image", "view", "half", "empty"):
            assert torch.equal(back[key], sample[key]) and back[key].dtype == sample[key].dtype
        back["image"] += 1  # a model may write to it
        assert torch.equal(back["instances"].gt_boxes.tensor, instances().gt_boxes.tensor)
        assert np.array_equal(back["instances"].gt_masks.polygons[0][0], np.arange(6.0))
        assert back["none"] is None and back["name"] == "a.png"
    assert int(IMAGE.max()) == 0


@pytest.mark.parametrize("limit", [1000, 40])
def test_large_batches_at_a_low_limit_of_open_files(limit, monkeypatch):
    """1,024 is Linux' usual limit; a batch of 256 with two read ahead had 2,000 files and more."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("agvm_d2.d2.handover.raise_open_files", lambda: limit)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    dicts = [{"file_name": str(i), "width": 9, "height": 9, "number": i} for i in range(64)]

    def make(num_workers):
        return ResumableLoader(
            dicts, _five_tensors, 256, lambda seed: TrainingSampler(64, seed=seed), num_workers
        )

    wanted = [d["number"] for d in read(make(0), 3)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512 if limit == 40 else 1024, hard))
        assert [d["number"] for d in read(make(4), 3)] == wanted
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert packer(10) is (pack if limit == 40 else pack_shared)


def _five_tensors(record):
    return {**record, **{f"t{i}": torch.zeros(9) for i in range(5)}}
