# The baseline to compare with: 117,266 images / 32 = 3,664.6 iterations an epoch;
# 13 epochs = 47,639.
from .faster_rcnn_swin_t_13ep_bs512_agvm import (
    agvm,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

dataloader.train.total_batch_size = 32
optimizer.lr = 1e-4
train.max_iter = 47639
train.clip_gradients = None
lr_multiplier.schedule.milestones = [32981]
lr_multiplier.schedule.num_updates = train.max_iter
lr_multiplier.warmup_length = 1000 / train.max_iter
agvm.enabled = False
