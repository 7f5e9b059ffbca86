# What every large-batch LazyConfig starts from: the arguments of agvm_d2.AGVMHook, and what
# agvm_d2/d2/lazy.py adds to Detectron2's `train`.
from functools import partial
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from fvcore.common.param_scheduler import MultiStepParamScheduler

from agvm_d2.solver import exp_warmup

agvm = dict(enabled=True)

train = get_config("common/train.py").train
train.seed = -1
train.micro_batch_size = 0
train.fsdp = None  # or a dict: agvm_d2.d2.fsdp.DEFAULTS
train.on_nonfinite = train.on_bad_image = "stop"
train.clip_gradients = dict(clip_type="full_model", clip_value=1.0, iter_range=())


def schedule(max_iter, milestones, warmup):
    """The learning rate / 10 at each of one or two milestones, after an exponential warm-up."""
    return L(exp_warmup)(
        schedule=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01][: len(milestones) + 1],
            milestones=milestones,
            num_updates=max_iter,
        ),
        warmup_factor=0.001,
        warmup_length=warmup / max_iter,
    )


def adamw(lr, weight_decay, overrides, layer_decay=None, num_layers=0):
    optimizer = get_config("common/optim.py").AdamW
    optimizer.lr = lr
    optimizer.weight_decay = weight_decay
    optimizer.params.overrides = {name: dict(weight_decay=0.0) for name in overrides}
    if layer_decay:
        optimizer.params.lr_factor_func = partial(
            get_vit_lr_decay_rate, num_layers=num_layers, lr_decay_rate=layer_decay
        )
    return optimizer
