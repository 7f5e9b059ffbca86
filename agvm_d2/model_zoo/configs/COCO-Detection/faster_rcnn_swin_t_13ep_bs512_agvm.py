# Faster R-CNN, Swin-T. 117,266 images / 512 = 229.04 iterations an epoch; 13 epochs = 2,977.
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.modeling import SwinTransformer

from ..common.agvm import adamw, agvm, schedule, train

model = get_config("common/models/mask_rcnn_fpn.py").model
[model.roi_heads.pop(key) for key in ("mask_in_features", "mask_pooler", "mask_head")]
model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
model.input_format = "RGB"
model.backbone.bottom_up = L(SwinTransformer)(
    depths=[2, 2, 6, 2],
    drop_path_rate=0.2,
    embed_dim=96,
    num_heads=[3, 6, 12, 24],
)
model.backbone.in_features = ("p0", "p1", "p2", "p3")

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.update(
    augmentations=[
        L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333),
        L(T.RandomFlip)(horizontal=True),
    ],
    image_format="RGB",
    use_instance_mask=False,
)
dataloader.train.total_batch_size = 512  # 16 on each of 32 GPUs; fewer: train.micro_batch_size=16
# 1e-4 at batch 32, then sqrt: 1e-4 * sqrt(512 / 32). The paper's is not in its code; this is ours.
optimizer = adamw(4e-4, 0.05, ["pos_embed", "relative_position_bias_table"])
# One drop, after 9 of 13 epochs, as in the paper's run; two epochs of warm-up.
lr_multiplier = schedule(2977, [2061], warmup=460)

train.init_checkpoint = "swin_tiny_patch4_window7_224.pth"  # of microsoft/Swin-Transformer
train.max_iter = 2977
train.amp.enabled = True
train.clip_gradients.iter_range = (360, 561)
agvm.start_iter = 560
