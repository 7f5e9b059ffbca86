# Cascade Mask R-CNN, Swin-B. 117,266 images / 512 = 229.04 iterations an epoch; 50 epochs = 11,452.
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.modeling import SwinTransformer

from ..common.agvm import adamw, agvm, schedule, train
from ..common.coco_lsj import dataloader

model = get_config("common/models/cascade_rcnn.py").model
model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
model.input_format = "RGB"
model.backbone.bottom_up = L(SwinTransformer)(
    depths=[2, 2, 18, 2],
    drop_path_rate=0.4,
    embed_dim=128,
    num_heads=[4, 8, 16, 32],
)
model.backbone.in_features = ("p0", "p1", "p2", "p3")
model.backbone.square_pad = 1024
dataloader.train.total_batch_size = 512  # 8 on each of 64 GPUs; fewer: train.micro_batch_size=8
# 1e-4 at batch 64, then sqrt: 1e-4 * sqrt(512 / 64).
optimizer = adamw(2.83e-4, 0.05, ["pos_embed", "relative_position_bias_table"])
# Drops after 8/9 and 26/27 of training; two epochs of warm-up.
lr_multiplier = schedule(11452, [10180, 11028], warmup=460)

train.init_checkpoint = "swin_base_patch4_window7_224_22k.pth"  # of microsoft/Swin-Transformer
train.max_iter = 11452
train.amp.enabled = True
train.clip_gradients.iter_range = (360, 561)
agvm.start_iter = 560
