# The bundled 96x96 digits.
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digits_train"),
        mapper=L(DatasetMapper)(
            is_train=True, augmentations=[], image_format="RGB", use_instance_mask=True
        ),
        total_batch_size=16,
        num_workers=1,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="digits_val", filter_empty=False),
        mapper=L(DatasetMapper)(is_train=False, augmentations=[], image_format="RGB"),
        num_workers=1,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="digits_val"),
)


def thin(model):
    """An R-CNN of Detectron2's common/models, made as small as the digits."""
    model.pixel_mean, model.pixel_std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    model.input_format = "RGB"
    model.backbone.out_channels = 32
    rpn, roi = model.proposal_generator, model.roi_heads
    rpn.in_features = ["p2", "p3", "p4", "p5"]
    rpn.head.in_channels = 32
    rpn.anchor_generator.sizes = [[12], [20], [32], [48]]
    rpn.anchor_generator.strides = [4, 8, 16, 32]
    rpn.update(batch_size_per_image=64, pre_nms_topk=(100, 100), post_nms_topk=(64, 64))
    roi.update(num_classes=10, batch_size_per_image=32, positive_fraction=0.5)
    roi.box_pooler.sampling_ratio = roi.mask_pooler.sampling_ratio = 1
    cascade = "box_heads" in roi
    for head in roi.box_heads if cascade else [roi.box_head]:
        head.update(input_shape=ShapeSpec(channels=32, height=7, width=7), fc_dims=[64, 64])
        head.conv_dims = []
    for predictor in roi.box_predictors if cascade else [roi.box_predictor]:
        predictor.input_shape = ShapeSpec(channels=64)
    roi.mask_head.input_shape = ShapeSpec(channels=32, height=14, width=14)
    roi.mask_head.conv_dims = [32, 32, 32]
    return model
