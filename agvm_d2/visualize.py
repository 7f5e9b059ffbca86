"""`python -m agvm_d2.visualize --config-file CONFIG --out PNG [KEY VALUE ...]`: images of the test
set, what is on them and what a trained model (MODEL.WEIGHTS) finds, side by side.

A project's own datasets and models come with `--import`."""

from __future__ import annotations
import argparse
import os
import sys
from collections.abc import Callable, Sequence
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.utils.visualizer import ColorMode, Visualizer
from torch import nn

import agvm_d2.data  # noqa: F401  registers the bundled datasets

from .d2 import lazy
from .d2.checkpoint import AtomicCheckpointer
from .d2.checks import check_datasets, check_device
from .d2.config import read_config
from .d2.imports import add_flag, add_unsafe_flag, import_project
from .validate import message

SIDE = 480  # pixels of the shorter side of a drawn image, at least


def draw_truth(image: np.ndarray, record: dict, metadata: Metadata) -> np.ndarray:
    """`image` (H, W, 3) RGB uint8 with the annotations of a dataset's record."""
    scale = max(1.0, SIDE / min(image.shape[:2]))
    if "annotations" in record:  # of a panoptic set its things, not the mask over all of them
        record = {key: value for key, value in record.items() if key != "sem_seg_file_name"}
    visualizer = Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.SEGMENTATION)
    return visualizer.draw_dataset_dict(record).get_image()


def draw_prediction(
    image: np.ndarray, output: dict, metadata: Metadata, threshold: float
) -> np.ndarray:
    """`image` with a model's output: panoptic, semantic or instances of at least `threshold`."""
    scale = max(1.0, SIDE / min(image.shape[:2]))
    visualizer = Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.SEGMENTATION)
    if "panoptic_seg" in output:
        segments, info = output["panoptic_seg"]
        return visualizer.draw_panoptic_seg(segments.cpu(), info, alpha=0.5).get_image()
    if "sem_seg" in output:
        return visualizer.draw_sem_seg(output["sem_seg"].argmax(0).cpu(), alpha=0.5).get_image()
    found = output["instances"].to("cpu")
    return visualizer.draw_instance_predictions(found[found.scores >= threshold]).get_image()


def load(
    config_file: str, opts: list[str], imports: Sequence[str] = (), allow_unsafe: bool = False
) -> tuple[nn.Module, Callable, str]:
    """A trained model in eval mode, its mapper of test images, and the name of the first test set.

    Args:
        imports: see `import_project`.
        allow_unsafe: let !!python tags run code.

    Raises:
        ValueError, KeyError, FileNotFoundError: names the config key or import.
    """
    project = import_project(imports, get_cfg())
    if config_file.endswith(".py"):
        cfg = lazy.load(config_file, opts)
        names, device = lazy.dataset_names(cfg, eval_only=True), cfg.train.device
        keys = ("train.init_checkpoint", "train.device", "dataloader.test.dataset.names")
        weights = cfg.train.init_checkpoint
    else:
        cfg = read_config(config_file, opts, allow_unsafe, project)
        names, device = cfg.DATASETS.TEST, cfg.MODEL.DEVICE
        keys = ("MODEL.WEIGHTS", "MODEL.DEVICE", "DATASETS.TEST")
        weights = cfg.MODEL.WEIGHTS
    if not names:
        raise ValueError(f"{keys[2]}: found none, but one is needed to draw from.")
    check_datasets(names[:1], keys[2])
    check_device(keys[1], device)
    if not os.path.isfile(weights.partition("?")[0]):
        raise FileNotFoundError(f"{keys[0]}: '{weights}' is no file: give a run's model_final.pth")
    if isinstance(cfg, CfgNode):
        model, mapper = build_model(cfg), DatasetMapper(cfg, is_train=False)
    else:
        model = instantiate(cfg.model).to(device)
        mapper = instantiate(cfg.dataloader.test.mapper)
    AtomicCheckpointer(model).load(weights)
    return model.eval(), mapper, names[0]


def visualize(
    model: nn.Module,
    mapper: Callable,
    dataset: str,
    picture: str,
    num: int = 4,
    threshold: float = 0.5,
) -> str:
    """Draw `num` images, spread over `dataset`, and return the PNG's path.

    Where no instance is drawn, a line on stderr says the highest score.

    Args:
        threshold: the lowest score of an instance drawn.
    """
    records, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    num = min(num, len(records))
    scores: list[float] = []
    drawn_by_score = False
    figure, axes = plt.subplots(2, num, figsize=(2.4 * num, 5), squeeze=False, layout="constrained")
    for i in range(num):
        record = records[i * len(records) // num]
        image = read_image(record["file_name"], "RGB")
        with torch.no_grad():
            output = model([mapper(record)])[0]
        if "instances" in output and not {"panoptic_seg", "sem_seg"} & {*output}:
            drawn_by_score = True
            scores += output["instances"].scores.tolist()
        axes[0, i].imshow(draw_truth(image, record, metadata))
        axes[1, i].imshow(draw_prediction(image, output, metadata, threshold))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("annotated")
    axes[1, 0].set_ylabel("found")
    figure.savefig(picture, dpi=200)  # an image drawn at SIDE is shown whole
    plt.close(figure)
    if drawn_by_score and max(scores, default=-1.0) < threshold:
        found = f"the highest score is {max(scores):.3f}" if scores else "the model finds nothing"
        print(f"No instance has a score of {threshold} (--threshold): {found}.", file=sys.stderr)
    return picture


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--out", default="predictions.png", metavar="PNG")
    parser.add_argument("--num", type=int, default=4, help="images")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score drawn")
    add_unsafe_flag(parser)
    add_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, as in training")
    args = parser.parse_args(argv)
    try:
        loaded = load(args.config_file, args.opts, args.imports, args.allow_unsafe_yaml)
        print(visualize(*loaded, args.out, args.num, args.threshold))
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"agvm_d2.visualize: error: {message(error)}")


if __name__ == "__main__":
    main()
