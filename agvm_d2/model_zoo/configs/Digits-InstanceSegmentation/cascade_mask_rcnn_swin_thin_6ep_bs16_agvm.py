# Cascade Mask R-CNN, a thin Swin. 2,000 images / 16 = 125 iterations an epoch; 6 epochs = 750.
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.modeling import SwinTransformer

from ..common.agvm import adamw, agvm, schedule, train
from ..common.digits import dataloader, thin

model = thin(get_config("common/models/cascade_rcnn.py").model)
model.backbone.bottom_up = L(SwinTransformer)(
    depths=[2, 2, 2, 2],
    drop_path_rate=0.0,
    embed_dim=32,
    num_heads=[1, 2, 4, 8],
    window_size=6,
)
model.backbone.in_features = ("p0", "p1", "p2", "p3")
model.backbone.square_pad = 96
optimizer = adamw(2e-3, 0.05, ["relative_position_bias_table"])
lr_multiplier = schedule(750, [620, 710], warmup=60)

train.device = "cpu"
train.seed = 1
train.micro_batch_size = 8
train.max_iter = 750
train.eval_period = 0
train.output_dir = "output/digits_swin"
train.expected_results = [["segm", "AP", 39.7, 4.0]]
agvm.start_iter = 100
agvm.interval = 5
