import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from agvm_d2.data import ade20k


@pytest.fixture
def folder(tmp_path):
    """Two images a split, labels 0 (other) to 150."""
    for split in ade20k.SPLITS:
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(2):
            labels = np.full((4, 5), 150 - i, np.uint8)
            labels[0] = 0
            Image.fromarray(labels).save(tmp_path / "annotations" / split / f"{i}.png")
            Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(
                tmp_path / "images" / split / f"{i}.jpg"
            )
    return tmp_path


def test_conversion(folder, capsys):
    ade20k.main([str(folder)])
    assert "training: 2 converted, 0 were there; 25.0% of pixels ignored" in capsys.readouterr().out
    for split in ade20k.SPLITS:
        converted = np.asarray(Image.open(folder / "annotations_detectron2" / split / "1.png"))
        assert (converted[0] == 255).all() and (converted[1:] == 148).all()


def test_a_second_run_keeps_what_is_there(folder):
    ade20k.convert(str(folder))
    (folder / "annotations_detectron2" / "training" / "0.png").unlink()
    assert ade20k.convert(str(folder)) == {"training": (1, 1, 0.25), "validation": (0, 2, 0.0)}


def test_the_dataset_is_detectron2s():
    meta = MetadataCatalog.get("ade20k_sem_seg_val")
    assert meta.evaluator_type == "sem_seg" and len(meta.stuff_classes) == 150


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="annotations/training' is not there"):
        ade20k.convert(str(tmp_path / "nowhere"))
    (folder / "annotations" / "validation" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 images' annotations, such as 1.png"):
        ade20k.convert(str(folder))


def test_the_full_ade20k_release_is_refused(folder):
    labels = np.full((4, 5), 200, np.uint8)
    Image.fromarray(labels).save(folder / "annotations" / "training" / "0.png")
    with pytest.raises(ValueError, match="up to 200; .*labels 0 to 150"):
        ade20k.convert(str(folder))
