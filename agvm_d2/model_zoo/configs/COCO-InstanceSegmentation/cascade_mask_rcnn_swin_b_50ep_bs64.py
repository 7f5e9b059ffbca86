# The baseline to compare with: 117,266 images / 64 = 1,832.3 iterations an epoch;
# 50 epochs = 91,614.
from .cascade_mask_rcnn_swin_b_50ep_bs512_agvm import (
    agvm,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

dataloader.train.total_batch_size = 64
optimizer.lr = 1e-4
train.max_iter = 91614
train.clip_gradients = None
lr_multiplier.schedule.milestones = [81435, 88221]
lr_multiplier.schedule.num_updates = train.max_iter
lr_multiplier.warmup_length = 1000 / train.max_iter
agvm.enabled = False
