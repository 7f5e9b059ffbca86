# Mask R-CNN, ViTDet-B. 117,266 images / 512 = 229.04 iterations an epoch; 100 epochs = 22,904.
from detectron2.model_zoo import get_config

from ..common.agvm import adamw, agvm, schedule, train
from ..common.coco_lsj import dataloader

model = get_config("common/models/mask_rcnn_vitdet.py").model
dataloader.train.total_batch_size = 512  # 8 on each of 64 GPUs; fewer: train.micro_batch_size=8
# 1e-4 at batch 64 in Detectron2, then sqrt: 1e-4 * sqrt(512 / 64); layer decay as there.
optimizer = adamw(2.83e-4, 0.1, ["pos_embed"], layer_decay=0.7, num_layers=12)
# Drops after 8/9 and 26/27 of training, as there; two epochs of warm-up.
lr_multiplier = schedule(22904, [20359, 22056], warmup=460)

train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
)
train.max_iter = 22904
train.amp.enabled = True
train.ddp.fp16_compression = False  # would take the communication hook
train.clip_gradients.iter_range = (360, 561)
agvm.start_iter = 560
