# Cascade Mask R-CNN on a ViT as large as ViT-g/14, 1.07 billion parameters: the size of UniNet-G,
# the largest model of the paper, and its batch. 117,266 images / 960 = 122.15 iterations an epoch;
# 1,349 are 11.04 epochs.
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
)

from ..common.agvm import adamw, agvm, schedule, train
from ..common.coco_lsj import dataloader

model = get_config("common/models/mask_rcnn_vitdet.py").model
model.backbone.net.update(
    embed_dim=1408,
    depth=40,
    num_heads=16,
    mlp_ratio=6144 / 1408,
    drop_path_rate=0.5,
    window_block_indexes=[i for i in range(40) if i % 10 != 9],
)
[model.roi_heads.pop(key) for key in ("box_head", "box_predictor", "proposal_matcher")]
model.roi_heads.update(
    _target_=CascadeROIHeads,
    box_heads=[
        L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=256, height=7, width=7),
            conv_dims=[256, 256, 256, 256],
            fc_dims=[1024],
            conv_norm="LN",
        )
        for _ in range(3)
    ],
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=weights),
            cls_agnostic_bbox_reg=True,
            num_classes="${...num_classes}",
        )
        for weights in ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
        for iou in (0.5, 0.6, 0.7)
    ],
)
dataloader.train.total_batch_size = 960  # such as 4 on each of 240 GPUs
# 1e-4 at batch 64 in Detectron2's ViTDet, then sqrt: 1e-4 * sqrt(960 / 64); layer decay as ViT-H's.
optimizer = adamw(3.87e-4, 0.1, ["pos_embed"], layer_decay=0.9, num_layers=40)
# Drops after 8/9 and 26/27 of training, as ViTDet's; two epochs of warm-up.
lr_multiplier = schedule(1349, [1199, 1299], warmup=244)

train.init_checkpoint = ""  # weights of a ViT-g with patches of 16, such as MAE's, if you have some
train.max_iter = 1349
train.fsdp = dict(precision="bfloat16", checkpoint_activations=True)
train.clip_gradients.iter_range = (144, 345)
agvm.start_iter = 344
