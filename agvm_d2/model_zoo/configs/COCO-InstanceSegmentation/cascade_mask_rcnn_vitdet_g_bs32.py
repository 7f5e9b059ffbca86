# The baseline to compare with: 117,266 images / 32 = 3,664.6 iterations an epoch; 12 epochs: 43,975
# (the paper's: 43,980).
from .cascade_mask_rcnn_vitdet_g_bs960_agvm import (
    agvm,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

dataloader.train.total_batch_size = 32
optimizer.lr = 7.07e-5  # 1e-4 * sqrt(32 / 64)
train.max_iter = 43980
train.clip_gradients = None
lr_multiplier.schedule.milestones = [39093, 42351]
lr_multiplier.schedule.num_updates = train.max_iter
lr_multiplier.warmup_length = 500 / train.max_iter
agvm.enabled = False
