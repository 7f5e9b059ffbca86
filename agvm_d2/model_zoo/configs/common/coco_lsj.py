# COCO with large-scale jitter at 1024 x 1024, as ViTDet trains.
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

SIZE = 1024

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.update(
    augmentations=[
        L(T.RandomFlip)(horizontal=True),
        L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=SIZE, target_width=SIZE),
        L(T.FixedSizeCrop)(crop_size=(SIZE, SIZE), pad=False),
    ],
    image_format="RGB",
    recompute_boxes=True,
)
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=SIZE, max_size=SIZE)
]
