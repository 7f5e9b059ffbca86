# Mask R-CNN, a thin ViTDet. 2,000 images / 16 = 125 iterations an epoch; 6 epochs = 750.
from detectron2.model_zoo import get_config

from ..common.agvm import adamw, agvm, schedule, train
from ..common.digits import dataloader, thin

model = thin(get_config("common/models/mask_rcnn_vitdet.py").model)
model.backbone.net.update(
    img_size=96,
    patch_size=8,
    embed_dim=64,
    depth=4,
    num_heads=4,
    drop_path_rate=0.0,
    window_size=6,
    window_block_indexes=[0, 2],
)
model.backbone.update(square_pad=96, scale_factors=(2.0, 1.0, 0.5), top_block=None)
levels = ["p2", "p3", "p4"]
model.proposal_generator.in_features = levels
model.proposal_generator.anchor_generator.update(sizes=[[14], [24], [40]], strides=[4, 8, 16])
model.roi_heads.box_in_features = model.roi_heads.mask_in_features = levels
model.roi_heads.box_pooler.scales = model.roi_heads.mask_pooler.scales = (1 / 4, 1 / 8, 1 / 16)
optimizer = adamw(2e-3, 0.1, ["pos_embed"], layer_decay=0.9, num_layers=4)
lr_multiplier = schedule(750, [620, 710], warmup=60)

train.device = "cpu"
train.seed = 1
train.micro_batch_size = 8
train.max_iter = 750
train.eval_period = 0
train.output_dir = "output/digits_vitdet"
train.expected_results = [["segm", "AP", 30.1, 4.0]]
agvm.start_iter = 100
agvm.interval = 5
