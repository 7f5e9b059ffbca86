"""ADE20K's SceneParse150 release, in the form Detectron2's `ade20k_sem_seg_{train,val}` wants.

    python -m agvm_d2.data.ade20k [FOLDER]

converts FOLDER/annotations/{training,validation} (0: other, 1..150) to
FOLDER/annotations_detectron2/... (0..149, 255: ignored) and says what it did. FOLDER is by default
$DETECTRON2_DATASETS/ADEChallengeData2016, unzipped from
http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip.
"""

from __future__ import annotations
import argparse
import os
import sys
import numpy as np
from PIL import Image
from tqdm import tqdm

FOLDER = "ADEChallengeData2016"
SPLITS = ("training", "validation")


def root() -> str:
    return os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), FOLDER)


def convert(folder: str) -> dict[str, tuple[int, int, float]]:
    """Convert both splits; files that are there already stay.

    Returns:
        split -> (files converted, files that were there, share of ignored pixels in the former).

    Raises:
        FileNotFoundError: a split, or the annotation of an image, is not there.
        ValueError: a label that is not an 8-bit index from 0 to 150.
    """
    found = {}
    for split in SPLITS:
        source = os.path.join(folder, "annotations", split)
        if not os.path.isdir(source):
            raise FileNotFoundError(
                f"'{source}' is not there: give the folder {FOLDER} as unzipped from the "
                "SceneParse150 release"
            )
        names = sorted(name for name in os.listdir(source) if name.endswith(".png"))
        images = os.path.join(folder, "images", split)
        missing = {n[:-4] for n in os.listdir(images)} - {n[:-4] for n in names}
        if missing:
            raise FileNotFoundError(
                f"'{source}' lacks {len(missing)} images' annotations, such as {min(missing)}.png"
            )
        target = os.path.join(folder, "annotations_detectron2", split)
        os.makedirs(target, exist_ok=True)
        todo = [name for name in names if not os.path.exists(os.path.join(target, name))]
        ignored = pixels = 0
        for name in tqdm(todo, desc=split, disable=None):
            labels = np.asarray(Image.open(os.path.join(source, name)))
            if labels.dtype != np.uint8 or labels.ndim != 2 or labels.max() > 150:
                raise ValueError(
                    f"'{os.path.join(source, name)}': found {labels.dtype} {labels.shape}, up to "
                    f"{labels.max()}; it must be an 8-bit grey image with labels 0 to 150"
                )
            # 0 wraps to 255. Written aside, so that an interrupted run leaves no half file.
            temporary = os.path.join(target, name + ".part")
            Image.fromarray(labels - np.uint8(1)).save(temporary, format="PNG")
            os.replace(temporary, os.path.join(target, name))
            ignored += int((labels == 0).sum())
            pixels += labels.size
        found[split] = len(todo), len(names) - len(todo), ignored / max(pixels, 1)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default=root())
    folder = parser.parse_args(argv).folder
    try:
        for split, (new, old, ignored) in convert(folder).items():
            print(f"{split}: {new} converted, {old} were there; {ignored:.1%} of pixels ignored")
    except (OSError, ValueError) as error:
        sys.exit(f"agvm_d2.data.ade20k: error: {error}")


if __name__ == "__main__":
    main()
