# The baseline to compare with, Detectron2's: 117,266 images / 64 = 1,832.3 iterations an epoch;
# 100 epochs = 183,228.
from .mask_rcnn_vitdet_b_100ep_bs512_agvm import (
    agvm,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

dataloader.train.total_batch_size = 64
optimizer.lr = 1e-4
train.max_iter = 183228
train.clip_gradients = None
lr_multiplier.schedule.milestones = [162869, 176442]
lr_multiplier.schedule.num_updates = train.max_iter
lr_multiplier.warmup_length = 250 / train.max_iter
agvm.enabled = False
