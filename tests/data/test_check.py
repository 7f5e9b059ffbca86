"""A table of hostile inputs: each is found, as one line with the file and the record."""

import gzip
import itertools
import json
import subprocess
import sys
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from PIL import Image

from agvm_d2.data import check as module
from agvm_d2.data.annotations import rle_pixels
from agvm_d2.data.check import check, check_dicts
from agvm_d2.data.coco_json import check_json, check_panoptic
from agvm_d2.data.faults import DatasetError

NAN, INF = float("nan"), float("inf")
WIDTH, HEIGHT = 40, 30


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(path, mode="RGB", size=(WIDTH, HEIGHT), **options):
    Image.new(mode, size).save(path, **options)


def rle(mask):
    code = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def coco():
    """Three images, six objects with polygons and keypoints, one crowd in run-length code."""
    annotations = []
    for i in range(6):
        x, y = 3 * i, 2 * i
        annotations.append(
            {
                "id": 10 + i,
                "image_id": 1 + i // 2,
                "category_id": 5 + i % 2,
                "iscrowd": 0,
                "area": 50.0,
                "bbox": [x, y, 10, 8],
                "segmentation": [[x, y, x + 10, y, x + 10, y + 8, x, y + 8]],
                "keypoints": [x + 1, y + 1, 2, x + 5, y + 5, 1],
                "num_keypoints": 2,
            }
        )
    mask = np.zeros((HEIGHT, WIDTH))
    mask[4:9, 6:20] = 1
    crowd = {"id": 16, "image_id": 3, "category_id": 5, "iscrowd": 1, "bbox": [6, 4, 14, 5]}
    annotations.append({**crowd, "segmentation": rle(mask)})
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2, 3)
        ],
        "annotations": annotations,
        "categories": [
            {"id": 5, "name": "cat", "keypoints": ["nose", "tail"]},
            {"id": 6, "name": "dog", "keypoints": ["nose", "tail"]},
        ],
    }


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (1, 2, 3):
        picture(folder / f"{i}.png")
    return folder


def set_(part, index, **fields):
    """A change of one record; a field set to ... is taken out."""

    def change(content):
        record = content[part][index]
        for key, value in fields.items():
            if value is ...:
                del record[key]
            else:
                record[key] = value

    return change


def image(**fields):
    return set_("images", 1, **fields)


def note(**fields):
    return set_("annotations", 3, **fields)


def category(**fields):
    return set_("categories", 1, **fields)


def top(key, value=...):
    def change(content):
        if value is ...:
            del content[key]
        else:
            content[key] = value

    return change


HERE = "annotation 13 of image 2"
ERROR, WARNING = "error", "warning"
# (what, the change of the file, error or warning, words of the message)
RECORDS = [
    ("no categories", top("categories"), ERROR, "categories: it is missing"),
    ("empty categories", top("categories", []), ERROR, "categories: found no category"),
    ("categories no list", top("categories", {}), ERROR, "categories: found {}, but it must be a"),
    ("no images", top("images"), ERROR, "images: it is missing"),
    ("empty images", top("images", []), ERROR, "images: found no image"),
    ("annotations null", top("annotations", None), ERROR, "annotations: found None"),
    ("an image is a list", lambda c: c["images"].append([1]), ERROR, "image number 3|be an object"),
    (
        "an annotation is text",
        lambda c: c["annotations"].insert(2, "x"),
        ERROR,
        "annotation number 2|found 'x', but it must be an object",
    ),
    ("image without id", image(id=...), ERROR, "image number 1|id: found 'none'"),
    ("image id null", image(id=None), ERROR, "image number 1|id: found None"),
    ("image id a list", image(id=[2]), ERROR, "image number 1|id: found [2]"),
    ("image id NaN", image(id=NAN), ERROR, "image number 1|id: found nan"),
    ("image id twice", image(id=1), ERROR, "image id 1 is there twice"),
    (
        "image listed twice",
        image(file_name="1.png"),
        ERROR,
        "image 2|'1.png' is there twice|image 1",
    ),
    ("no file_name", image(file_name=...), ERROR, "image 2: file_name: found 'none'"),
    ("empty file_name", image(file_name=""), ERROR, "image 2: file_name: found ''"),
    ("file_name a number", image(file_name=2), ERROR, "image 2: file_name: found 2"),
    (
        "absolute file_name",
        image(file_name="/etc/2.png"),
        ERROR,
        "image 2|/etc/2.png|outside_image",
    ),
    (
        "file_name leaves",
        image(file_name="a/../../2.png"),
        ERROR,
        "image 2|a/../../2.png|stay inside",
    ),
    (
        "file is not there",
        image(file_name="9.png"),
        ERROR,
        "image 2|9.png'|be a file that is there",
    ),
    ("folder is not there", image(file_name="x/2.png"), ERROR, "image 2|x/2.png'|that is there"),
    ("no width", image(width=...), ERROR, "image 2: width: found 'none'"),
    ("width 0", image(width=0), ERROR, "image 2: width: found 0"),
    ("width negative", image(width=-40), ERROR, "image 2: width: found -40"),
    ("height text", image(height="30"), ERROR, "image 2: height: found '30'"),
    ("height NaN", image(height=NAN), ERROR, "image 2: height: found nan"),
    ("width wrong", image(width=41), ERROR, "image 2: width and height: found 41 x 30|is 40 x 30"),
    ("sides swapped", image(width=30, height=40), ERROR, "image 2|found 30 x 40|is 40 x 30"),
    ("annotation without id", note(id=...), ERROR, "annotation number 3|id: found 'none'"),
    ("annotation id twice", note(id=10), ERROR, "annotation id 10 is there twice"),
    ("no image_id", note(image_id=...), ERROR, "annotation number 3|image_id: found 'none'"),
    ("unknown image_id", note(image_id=9), ERROR, "annotation 13|image_id: found 9"),
    (
        "image_id is text",
        note(image_id="2"),
        ERROR,
        "image_id: found '2'|there is 2, of another type",
    ),
    (
        "no category_id",
        note(category_id=...),
        ERROR,
        "annotation number 3|category_id: found 'none'",
    ),
    ("unknown category", note(category_id=7), ERROR, f"{HERE}: category_id: found 7"),
    ("category_id is text", note(category_id="6"), ERROR, "found '6'|there is 6, of another type"),
    ("category_id 6.0", note(category_id=6.0), ERROR, "category_id: found 6.0"),
    ("category id twice", category(id=5), ERROR, "category id 5 is there twice"),
    ("category without id", category(id=...), ERROR, "category number 1|id: found 'none'"),
    ("category without name", category(name=...), ERROR, "category 6: category's name: found None"),
    ("category name twice", category(name="cat"), WARNING, "category name 'cat' is there twice"),
    (
        "category without annotations",
        lambda c: c["categories"].append({"id": 9, "name": "cow"}),
        WARNING,
        "1 of 3 categories have no annotation, such as 'cow'",
    ),
    ("no box", note(bbox=...), ERROR, f"{HERE}: bbox: found None, but it must be four numbers"),
    ("box empty", note(bbox=[]), ERROR, f"{HERE}: bbox: found []"),
    ("box of three", note(bbox=[1, 2, 3]), ERROR, f"{HERE}: bbox: found [1, 2, 3]"),
    ("box of text", note(bbox=["1", "2", "3", "4"]), ERROR, f"{HERE}: bbox: found ['1'"),
    ("box with null", note(bbox=[1, 2, None, 4]), ERROR, f"{HERE}: bbox: found [1, 2, None, 4]"),
    ("box NaN", note(bbox=[1, NAN, 3, 4]), ERROR, f"{HERE}: bbox: found [1, nan, 3, 4]|finite"),
    ("box inf", note(bbox=[1, 2, INF, 4]), ERROR, f"{HERE}: bbox|inf|finite"),
    ("box huge", note(bbox=[1, 2, 1e9, 4]), ERROR, f"{HERE}: bbox|1000000000.0|10 times the image"),
    ("box negative", note(bbox=[20, 20, -5, 4]), ERROR, f"{HERE}: bbox|negative width or height"),
    ("box without area", note(bbox=[1, 2, 0, 4]), ERROR, f"{HERE}: bbox|have an area"),
    ("box outside", note(bbox=[50, 2, 5, 4]), ERROR, f"{HERE}: bbox|lie in the image"),
    ("box sticks out", note(bbox=[30, 2, 20, 4]), WARNING, f"{HERE}: bbox|stick out of the image"),
    ("polygon odd", note(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), ERROR, f"{HERE}|even number"),
    ("two points", note(segmentation=[[1, 2, 3, 4]]), ERROR, f"{HERE}|at least 3 points"),
    ("polygon empty", note(segmentation=[[]]), ERROR, f"{HERE}|at least 3 points"),
    ("polygon NaN", note(segmentation=[[1, 2, 3, NAN, 5, 6]]), ERROR, f"{HERE}|nan|finite"),
    ("polygon inf", note(segmentation=[[1, 2, 3, -INF, 5, 6]]), ERROR, f"{HERE}|-inf|finite"),
    (
        "polygon huge",
        note(segmentation=[[1, 2, 1e9, 4, 5, 6]]),
        ERROR,
        f"{HERE}|10 times the image",
    ),
    ("polygon flat", note(segmentation=[1, 2, 3, 4, 5, 6]), ERROR, f"{HERE}|a list of polygons"),
    (
        "polygon of points",
        note(segmentation=[[[1, 2], [3, 4], [5, 6], [7, 8], [1, 1], [2, 2]]]),
        ERROR,
        f"{HERE}|have numbers",
    ),
    ("polygon with text", note(segmentation=[[1, 2, 3, "a", 5, 6]]), ERROR, f"{HERE}|have numbers"),
    ("mask is text", note(segmentation="1 2 3"), ERROR, f"{HERE}|a list of polygons, or a run"),
    (
        "code of another size",
        note(segmentation=rle(np.ones((WIDTH, HEIGHT)))),
        ERROR,
        f"{HERE}|size",
    ),
    ("code of no size", note(segmentation={"size": [None, None], "counts": "x"}), ERROR, "|size"),
    ("code without size", note(segmentation={"counts": "x"}), ERROR, f"{HERE}|size"),
    ("code without counts", note(segmentation={"size": [30, 40]}), ERROR, f"{HERE}|have counts"),
    (
        "code too short",
        note(segmentation={"size": [30, 40], "counts": [5, 4]}),
        ERROR,
        f"{HERE}|cover",
    ),
    (
        "code negative",
        note(segmentation={"size": [30, 40], "counts": [1201, -1]}),
        ERROR,
        f"{HERE}|cover",
    ),
    (
        "code garbage",
        note(segmentation={"size": [30, 40], "counts": "zz~"}),
        ERROR,
        f"{HERE}|cover",
    ),
    ("keypoints too few", note(keypoints=[1, 1, 2]), ERROR, f"{HERE}: keypoints|as many as"),
    ("keypoints no triples", note(keypoints=[1, 1, 2, 3]), ERROR, f"{HERE}: keypoints|triples"),
    ("keypoints text", note(keypoints="1 1 2"), ERROR, f"{HERE}: keypoints|triples"),
    ("keypoint NaN", note(keypoints=[1, NAN, 2, 1, 1, 2]), ERROR, f"{HERE}: keypoints|finite"),
    ("keypoint far", note(keypoints=[1, 9e8, 2, 1, 1, 2]), ERROR, f"{HERE}: keypoints|10 times"),
    ("visibility 3", note(keypoints=[1, 1, 3, 1, 1, 2]), ERROR, f"{HERE}: keypoints|0, 1 or 2"),
    ("iscrowd 2", note(iscrowd=2), ERROR, f"{HERE}: iscrowd: found 2"),
    ("iscrowd text", note(iscrowd="0"), ERROR, f"{HERE}: iscrowd: found '0'"),
    ("area NaN", note(area=NAN), ERROR, f"{HERE}: area: found nan"),
    ("area negative", note(area=-1), ERROR, f"{HERE}: area: found -1"),
    ("area text", note(area="50"), ERROR, f"{HERE}: area: found '50'"),
    ("ignore", note(ignore=1), ERROR, f"{HERE}: ignore: found 1"),
]


def lines(report):
    return {ERROR: report.errors(), WARNING: report.warnings()}


def found(report, level, words, file):
    """The one line of all that has the words."""
    hits = [line for line in lines(report)[level] if all(w in line for w in words.split("|"))]
    assert len(hits) == 1, lines(report)
    assert str(file) in hits[0] and "\n" not in hits[0]
    assert level == ERROR or not report.errors()
    return hits[0]


@pytest.mark.parametrize("what, change, level, words", RECORDS, ids=[r[0] for r in RECORDS])
def test_a_bad_record(what, change, level, words, images, tmp_path):
    content = coco()
    change(content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    report, _ = check_json(str(path), str(images))
    found(report, level, words, path)


WHOLE = json.dumps(coco()).encode()
FILES = [
    ("cut off", WHOLE[:-40], "not JSON"),
    ("cut off in a text", WHOLE[: WHOLE.index(b"file_name") + 4], "not JSON"),
    ("a byte order mark", b"\xef\xbb\xbf" + WHOLE, "byte order mark"),
    ("UTF-16", WHOLE.decode().encode("utf-16"), "UTF-16"),
    ("UTF-16 without a mark", WHOLE.decode().encode("utf-16-le"), "UTF-16"),
    ("Latin-1", WHOLE.replace(b"cat", b"\xe9t\xe9"), "not UTF-8"),
    ("compressed", gzip.compress(WHOLE), "compressed"),
    ("empty", b"", "empty"),
    ("blank", b" \n", "empty"),
    ("a list", b"[" + WHOLE + b"]", "found a list at the top"),
    ("a number", b"3", "found a int at the top"),
    ("too deep", b"[" * 200000, ""),
    ("two values", WHOLE + WHOLE, "not JSON"),
    ("single quotes", str(coco()).encode(), "not JSON"),
]


@pytest.mark.parametrize("what, content, words", FILES, ids=[f[0] for f in FILES])
def test_a_bad_file(what, content, words, images, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    report, _ = check_json(str(path), str(images))
    found(report, ERROR, words, path)
    assert len(report.faults) == 1


def animated(path):
    frames = [Image.new("L", (WIDTH, HEIGHT), i) for i in (0, 200)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


IMAGES = [
    ("16 bits", lambda p: picture(p, "I;16"), ERROR, "I;16|more than 8 bits"),
    ("32 bits", lambda p: picture(p, "I", format="TIFF"), ERROR, "mode I|more than 8 bits"),
    ("float", lambda p: picture(p, "F", format="TIFF"), ERROR, "mode F|more than 8 bits"),
    ("no image", lambda p: p.write_text("hello"), ERROR, "cannot be read"),
    ("an empty file", lambda p: p.write_text(""), ERROR, "cannot be read"),
    ("a header cut off", lambda p: p.write_bytes(p.read_bytes()[:20]), ERROR, "cannot be read"),
    ("another size", lambda p: picture(p, size=(20, 20)), ERROR, "found 40 x 30|is 20 x 20"),
    ("CMYK", lambda p: picture(p, "CMYK", format="JPEG"), WARNING, "mode CMYK"),
    ("LAB", lambda p: picture(p, "LAB", format="TIFF"), WARNING, "mode LAB"),
    ("RGBA", lambda p: picture(p, "RGBA"), WARNING, "RGBA with transparency"),
    (
        "palette with alpha",
        lambda p: picture(p, "P", transparency=0),
        WARNING,
        "P with transparency",
    ),
    ("animated", animated, WARNING, "several frames"),
]


@pytest.mark.parametrize("what, write, level, words", IMAGES, ids=[i[0] for i in IMAGES])
def test_a_bad_image(what, write, level, words, images, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(WHOLE)
    write(images / "2.png")
    report, _ = check_json(str(path), str(images))
    found(report, level, f"image 2|2.png|{words}", path)
    # Skipped like any bad image, where that is asked for.
    assert not report.errors(skip_images=True)


names = (f"hostile_{i}" for i in itertools.count())


def register(function, **metadata):
    name = next(names)
    DatasetCatalog.register(name, function)
    MetadataCatalog.get(name).set(**metadata)
    return name


# Semantic label files


def label(values=0, mode="L", size=(WIDTH, HEIGHT)):
    def write(path):
        Image.new(mode, size, values).save(path, format="PNG")

    return write


LABELS = [
    ("label out of range", label(3), "label 3|below 3"),
    ("another size", label(size=(HEIGHT, WIDTH)), "30 x 40, but its image|40 x 30"),
    ("a palette", label(mode="P"), "mode P"),
    ("16 bits", label(mode="I;16"), "mode I;16"),
    ("colours", label((0, 0, 0), "RGB"), "mode RGB"),
    ("one bit", label(mode="1"), "mode 1"),
    ("no image", lambda path: path.write_text("x"), "cannot be read"),
    (
        "another name",
        lambda path: path.rename(path.with_name("4.png")),
        "2.png': sem_seg_file_name|3.png|named as its image",
    ),
]


@pytest.mark.parametrize("what, write, words", LABELS, ids=[i[0] for i in LABELS])
def test_a_bad_label(what, write, words, images, tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    for i in (1, 2, 3):
        label(255 if i == 1 else 2)(labels / f"{i}.png")

    def load():
        files = zip(sorted(images.iterdir()), sorted(labels.iterdir()))
        return [{"file_name": str(i), "sem_seg_file_name": str(s)} for i, s in files]

    name = register(load, stuff_classes=["a", "b", "c"], ignore_label=255, evaluator_type="sem_seg")
    assert check(name).faults == []
    write(labels / "2.png")
    found(check(name), ERROR, words, name)


# COCO's panoptic format


def panoptic(folder):
    """Two images of two segments."""
    folder.mkdir()
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, :20, 0], pixels[:, 20:, 1] = 7, 1  # segments 7 and 256
    for i in (1, 2):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)],
        "annotations": [
            {
                "image_id": i,
                "file_name": f"{i}.png",
                "segments_info": [{"id": 7, "category_id": 1}, {"id": 256, "category_id": 2}],
            }
            for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "sky"}],
    }


def entry(**fields):
    return set_("annotations", 1, **fields)


def segment(**fields):
    def change(content):
        content["annotations"][1]["segments_info"][0].update(fields)

    return change


PANOPTIC = [
    ("no annotations", top("annotations"), "annotations: it is missing"),
    ("image twice", entry(image_id=1), "image 1 has two annotations"),
    ("unknown image", entry(image_id=3), "image 3: image_id: found 3"),
    ("no image_id", entry(image_id=...), "annotation number 1|image_id: found 'none'"),
    ("no file_name", entry(file_name=...), "image 2: file_name: found None"),
    ("file_name leaves", entry(file_name="../2.png"), "image 2: file_name: found '../2.png'"),
    ("file is not there", entry(file_name="3.png"), "image 2|3.png'|be a file that is there"),
    ("no segments_info", entry(segments_info=...), "image 2: segments_info: found None"),
    ("segment id twice", segment(id=256), "image 2: segment id: found 256"),
    ("segment id 0", segment(id=0), "image 2: segment id: found 0"),
    ("segment not drawn", segment(id=8), "image 2|segment 8 is in segments_info, but not drawn"),
    ("segment drawn only", segment(id=8), "image 2|segment 7 is drawn, but not in segments_info"),
    ("unknown category", segment(category_id=3), "image 2: category_id of segment 7: found 3"),
]


@pytest.mark.parametrize("what, change, words", PANOPTIC, ids=[p[0] for p in PANOPTIC])
def test_a_bad_panoptic_file(what, change, words, tmp_path):
    content = panoptic(tmp_path / "png")
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    assert check_panoptic(str(path), str(tmp_path / "png")).faults == []
    change(content)
    path.write_text(json.dumps(content))
    found(check_panoptic(str(path), str(tmp_path / "png")), ERROR, words, path)


def test_a_grey_panoptic_image(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(panoptic(tmp_path / "png")))
    picture(tmp_path / "png" / "2.png", "L")
    report = check_panoptic(str(path), str(tmp_path / "png"))
    found(report, ERROR, "image 2|2.png': mode L", path)


# Dataset dicts


def dicts(images):
    return [
        {
            "file_name": str(images / f"{i}.png"),
            "image_id": i,
            "width": WIDTH,
            "height": HEIGHT,
            "annotations": [
                {
                    "bbox": [2, 3, 12, 9],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": 1,
                    "segmentation": [[2, 3, 12, 3, 12, 9]],
                }
            ],
        }
        for i in (1, 2, 3)
    ]


def at(**fields):
    def change(records):
        annotation = records[1]["annotations"][0]
        annotation.update(fields)
        for key in [k for k, v in annotation.items() if v is ...]:
            del annotation[key]

    return change


def record(**fields):
    return lambda records: records[1].update(fields)


THERE = "record 1 (image 2), annotation 0"
DICTS = [
    ("no bbox_mode", at(bbox_mode=...), ERROR, f"{THERE}: bbox_mode: found None"),
    ("class too high", at(category_id=2), ERROR, f"{THERE}: category_id: found 2|0 to 1"),
    ("class negative", at(category_id=-1), ERROR, f"{THERE}: category_id: found -1"),
    ("class a text", at(category_id="1"), ERROR, f"{THERE}: category_id: found '1'"),
    ("no class", at(category_id=...), ERROR, f"{THERE}: category_id: found None"),
    ("corners swapped", at(bbox=[12, 9, 2, 3]), ERROR, f"{THERE}: bbox|negative width"),
    ("box NaN", at(bbox=np.array([1, NAN, 2, 2])), ERROR, f"{THERE}: bbox|finite"),
    ("two points", at(segmentation=[[1, 2, 3, 4]]), ERROR, f"{THERE}: segmentation|3 points"),
    ("polygon inf", at(segmentation=[np.full(6, INF)]), ERROR, f"{THERE}: segmentation|finite"),
    (
        "annotations a dict",
        record(annotations={}),
        ERROR,
        "record 1 (image 2): annotations: found {}",
    ),
    ("no file_name", record(file_name=None), ERROR, "record 1 (image 2): file_name: found None"),
    ("file is not there", record(file_name="x/9.png"), ERROR, "record 1 (image 2)|x/9.png"),
    (
        "label is not there",
        record(sem_seg_file_name="x/9.png"),
        ERROR,
        "sem_seg_file_name: found 'x",
    ),
    ("width 0", record(width=0), ERROR, "record 1 (image 2): width: found 0"),
    ("a record is a list", lambda r: r.append([]), ERROR, "record 3: record: found []"),
    ("no records", lambda r: r.clear(), ERROR, "found no images"),
    ("an image twice", lambda r: r.append(r[0]), WARNING, "image_id 1 is there twice"),
    ("a file twice", lambda r: r.append(r[0]), WARNING, "1.png' is there twice"),
]


@pytest.mark.parametrize("what, change, level, words", DICTS, ids=[d[0] for d in DICTS])
def test_bad_dicts(what, change, level, words, images):
    records = dicts(images)
    name = register(lambda: records, thing_classes=["cat", "dog"])
    assert check(name).faults == []
    change(records)
    found(check(name), level, words, name)


def test_a_function_that_fails():
    name = register(lambda: {}["id"])
    with pytest.raises(DatasetError, match=f"'{name}': the function .* fails: KeyError: 'id'"):
        check(name)


def test_a_coco_file_behind_a_function(images, tmp_path):
    """As in the balloon tutorial: the catalog does not know of the file."""
    path = tmp_path / "a.json"
    content = coco()
    del content["annotations"][2]["image_id"]
    path.write_text(json.dumps(content))
    name = register(lambda: load_coco_json(str(path), str(images)), thing_classes=["cat", "dog"])
    with pytest.raises(DatasetError, match="a.json: annotation number 2: .*image_id: found 'none'"):
        check(name)


# What is fine


def test_nothing_is_found_where_nothing_is_wrong(digits, images, tmp_path):
    import agvm_d2.data  # noqa: F401

    for name in ("digits_train", "digits_val_sem_seg", "digits_train_panoptic"):
        assert check(name).faults == []
    path = tmp_path / "a.json"
    path.write_bytes(WHOLE)  # with a crowd without area
    report, _ = check_json(str(path), str(images))
    assert report.faults == [] and report.facts["keypoints"] == [2]
    assert report.facts["codes"] == [0, ""]  # crowds do not count


def test_an_lvis_file(images, tmp_path):
    content = coco()
    for img in content["images"]:
        img["coco_url"] = f"http://images.cocodataset.org/images/{img.pop('file_name')}"
    for annotation in content["annotations"]:
        annotation.pop("iscrowd")
    del content["annotations"][-1]
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    report, _ = check_json(str(path), f"{tmp_path}/", lvis=True)
    assert report.faults == []
    content["images"][1]["coco_url"] = "2.png"
    path.write_text(json.dumps(content))
    report, _ = check_json(str(path), f"{tmp_path}/", lvis=True)
    found(report, ERROR, "image 2: coco_url: found '2.png'", path)


def test_a_rare_slip_is_a_warning(images, tmp_path):
    """COCO 2017 has two boxes without area."""
    content = coco()
    more = content["annotations"][0]
    content["annotations"] += [{**more, "id": 100 + i} for i in range(300)]
    content["annotations"][3]["bbox"] = [1, 2, 0, 4]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    report, _ = check_json(str(path), str(images))
    found(report, WARNING, f"{HERE}: bbox|have an area", path)
    for annotation in content["annotations"][100:110]:
        annotation["bbox"] = [1, 2, 0, 4]
    path.write_text(json.dumps(content))
    report, _ = check_json(str(path), str(images))
    assert "(and 10 more)" in found(report, ERROR, f"{HERE}: bbox|have an area", path)


def test_files_outside_of_the_root_may_be_allowed(images, tmp_path):
    content = coco()
    content["images"][1]["file_name"] = str(images / "2.png")
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    meta = {"json_file": str(path), "image_root": str(images), "evaluator_type": "coco"}
    assert len(check(register(list, **meta)).errors()) == 1
    assert check(register(list, **meta, outside_image_root=True)).faults == []


def test_it_is_kept_until_something_changes(images, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(WHOLE)
    name = register(list, json_file=str(path), image_root=str(images), evaluator_type="coco")
    looks = []
    original = module.check_json
    monkeypatch.setattr(
        module, "check_json", lambda *a, **k: (looks.append(1), original(*a, **k))[1]
    )
    first = check(name)
    assert check(name) == first and len(looks) == 1
    (images / "2.png").unlink()
    assert "2.png" in check(name).errors()[0] and len(looks) == 2
    path.write_text(json.dumps(coco()) + " ")
    picture(images / "2.png")
    assert check(name).faults == [] and len(looks) == 3


def test_a_cache_that_cannot_be_written_is_done_without(images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "a.json"
    path.write_bytes(WHOLE)
    name = register(list, json_file=str(path), image_root=str(images), evaluator_type="coco")
    assert check(name).faults == []


def test_a_cache_without_locks_is_done_without(images, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    path = tmp_path / "a.json"
    path.write_bytes(WHOLE)
    name = register(list, json_file=str(path), image_root=str(images), evaluator_type="coco")
    assert check(name).faults == []


def test_run_length_codes():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(rng.integers(1, 60, 2)) < rng.random()
        code = rle(mask)
        assert rle_pixels(code["counts"]) == mask.size
        assert rle_pixels(code["counts"].encode()) == mask.size
    wide = np.zeros((3000, 4000))
    wide[2000:, 3000:] = 1
    assert rle_pixels(rle(wide)["counts"]) == wide.size
    for bad in (b"", "", b"\xff\xfe", "zzzz", None, [1, -1], ["a"], "~"):
        assert rle_pixels(bad) == -1


def test_the_command(digits):
    command = [sys.executable, "-W", "ignore", "-m", "agvm_d2.data.check"]
    done = subprocess.run([*command, "digits_val", "digits_val_panoptic"], stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stdout.decode().splitlines() == [
        "digits_val: nothing wrong was found",
        "digits_val_panoptic: nothing wrong was found",
    ]
    done = subprocess.run([*command, "no_such"], stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"'no_such' is not a registered dataset" in done.stderr


def test_the_table_is_long_enough():
    kinds = [RECORDS, FILES, IMAGES, LABELS, PANOPTIC, DICTS]
    assert sum(map(len, kinds)) >= 60


def test_dicts_of_other_kinds_are_left_alone():
    """A mapper of the project's own may read what has no file_name and no box."""
    report = check_dicts("mine", [{"video": "a.mp4", "length": 3}, {"video": "b.mp4", "length": 4}])
    assert report.faults == []
