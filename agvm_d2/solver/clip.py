"""What happens to gradients just before a step: clipping, and skipping where one is NaN or inf."""

from __future__ import annotations
import collections
import copy
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any
import torch
import torch.distributed as dist
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ..norms import block_norms
from ..shards import local_part
from ..validate import holds, is_int, is_number, require

logger = logging.getLogger("detectron2.agvm_d2")

CLIP_TYPES = ("value", "norm", "full_model", "relative")
MEMORY = 0.98  # of the average that "relative" clips by: about 50 steps
GROWTH = 1.5  # times the average: more does not count, so that it hardly follows an explosion
AVERAGE = "average_norm"  # every param group's key for it, so that checkpoints have it
LARGEST = torch.finfo(torch.float32).max

MAX_SKIPPED = 20  # steps in a row, or
MAX_SHARE = 50  # of the last 100: the model has diverged

# Of each optimizer that leaves steps out: what is to be done when it does.
_SKIPPING: weakref.WeakKeyDictionary[torch.optim.Optimizer, Callable[[], None]]
_SKIPPING = weakref.WeakKeyDictionary()


def _is_window(value: Any) -> bool:
    return not value or (len(value) == 2 and all(map(is_int, value)) and value[0] < value[1])


# Argument of `clip_gradients` -> (what holds of a good value, in words).
CLIP: dict[str, tuple[Callable[[Any], bool], str]] = {
    "clip_type": (lambda v: v in CLIP_TYPES, f"be one of {', '.join(CLIP_TYPES)}"),
    "clip_value": (lambda v: is_number(v) and 0 < v < math.inf, "be positive"),
    "norm_type": (lambda v: is_number(v) and v > 0, "be positive"),
    "iter_range": (_is_window, "be () or two iterations (first, last) with first < last"),
}


def clip_key(name: str) -> str:
    """The key of a yacs config for an argument of `clip_gradients`."""
    return f"SOLVER.CLIP_GRADIENTS.{name.upper()}"


def check_clip(values: Mapping[str, Any], key: Callable[[str], str] = str) -> None:
    """See that these arguments of `clip_gradients` are good.

    Args:
        key: name -> what a message calls it.

    Raises:
        ValueError: names the key, what was found and what it must be.
    """
    for name, value in values.items():
        condition, need = CLIP[name]
        require(holds(condition, value), key(name), value, need)
    if values.get("clip_type") == "relative" and "clip_value" in values:
        value = values["clip_value"]
        need = "be above 1 where the type is 'relative': times the usual norm, such as 4.0"
        require(value > 1, key("clip_value"), value, need)


def clip_gradients(
    optimizer: torch.optim.Optimizer,
    clip_type: str,
    clip_value: float,
    norm_type: float = 2.0,
    iter_range: tuple[int, int] | tuple[()] = (),
) -> None:
    """Clip gradients just before each step of `optimizer`.

    Args:
        clip_type: "value", "norm" (of each parameter), "full_model" (of all together), or
            "relative": that of all together to `clip_value` times its moving average, so that one
            value is for any model. AutoClip (Seetharaman et al. 2020, arXiv 2007.14469) takes a
            percentile of all norms so far instead. The average is in the optimizer's state.
        iter_range: clip in iterations [first, last) only, those of Detectron2's EventStorage.

    Raises:
        ValueError: see `check_clip`.
    """
    options = (clip_type, clip_value, norm_type, iter_range)
    check_clip(dict(zip(CLIP, options, strict=True)))
    # The order now, so that a norm has the same bits whether groups are split later or not.
    order = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
    if norm_type == math.inf and any(hasattr(p, "to_local") for p in order):
        raise ValueError(
            "norm_type: found inf, which torch cannot take of a sharded model, where a worker's "
            "part may be empty: use 2.0."
        )

    def clip_now(*_: Any) -> None:
        unscale(optimizer)
        order.update(dict.fromkeys(p for group in optimizer.param_groups for p in group["params"]))
        params = [*order]
        inside = not iter_range or iter_range[0] <= _iteration(params) < iter_range[1]
        if all(p.grad is None for p in params):  # a skipped step
            return
        if clip_type == "relative":
            _clip_relative(optimizer.param_groups, params, clip_value, norm_type, inside)
        elif not inside:
            return
        elif clip_type == "full_model":
            clip_grad_norm_(params, clip_value, norm_type)
        elif clip_type == "norm":
            for param in params:
                clip_grad_norm_(param, clip_value, norm_type)
        else:
            clip_grad_value_(params, clip_value)

    optimizer.register_step_pre_hook(clip_now)


@torch.no_grad()
def _clip_relative(
    groups: list[dict[str, Any]],
    params: list[torch.Tensor],
    multiple: float,
    norm_type: float,
    clips: bool,
) -> None:
    """All on the device: nothing waits for the norm. In a step that it does not clip, it averages
    all the same."""
    # Times 1; where the norm overflows, all is 0, and no step is made of it. An inf becomes a NaN,
    # as in all of torch's clipping.
    norm = clip_grad_norm_(params, LARGEST, norm_type)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()
    known = norm.isfinite() & (norm > 0)
    key = f"{AVERAGE}_{norm_type:g}"
    average, steps = groups[0].get(key, torch.zeros(2)).to(norm).unbind()
    limit, most = ((x * average).where(steps > 0, LARGEST) for x in (multiple, GROWTH))
    steps = steps + known
    share = (1 / steps).clamp(min=1 - MEMORY)  # the mean of the first steps
    new = average + share * (torch.minimum(norm, most) - average)
    kept = torch.stack([new.where(known, average), steps])
    for group in groups:  # which is first may change before a resume
        group[key] = kept
    if clips:
        factor = (limit / norm).where(norm > limit, 1.0)
        _multiply([local_part(p.grad) for p in params if p.grad is not None], factor)


def _iteration(params: list[torch.Tensor]) -> int:
    """That of Detectron2's EventStorage; -1 outside of one in a step with gradients of 0, by which
    torch.distributed.checkpoint makes an optimizer's states before it reads them."""
    try:
        return get_event_storage().iter
    except AssertionError:
        if any(p.grad is not None and local_part(p.grad).any() for p in params):
            raise ValueError(
                "clip_gradients: iter_range counts the iterations of Detectron2's EventStorage, "
                "and there is none: train inside `with EventStorage():`."
            ) from None
        return -1


@torch.no_grad()
def unscale(optimizer: torch.optim.Optimizer) -> None:
    """With a GradScaler, a fused optimizer divides its gradients by the loss scale inside its step;
    do so now, so that what runs before the step sees them as they are."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.div_(scale.to(param.grad.device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]  # set by the GradScaler


@torch.no_grad()
def _finite(tensors: list[torch.Tensor]) -> bool:
    """On all workers alike: each looks at its shards where they are sharded."""
    parts = [local_part(tensor) for tensor in tensors]
    norms = [n for norms in block_norms(parts) for n in norms]
    finite = torch.cat([*norms, parts[0].new_zeros(1).float()]).isfinite().all()
    if any(part is not tensor for part, tensor in zip(parts, tensors, strict=True)):
        finite = finite.int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    try:  # few kernels on CUDA; not public, so with the public form beside it
        torch._foreach_copy_(targets, sources)
    except (AttributeError, RuntimeError):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _multiply(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    multiply = getattr(torch, "_foreach_mul_", None)  # as in `_copy`
    for device in {tensor.device for tensor in tensors}:
        part, local = [t for t in tensors if t.device == device], factor.to(device)
        if multiply is not None:
            multiply(part, local)
            continue
        for tensor in part:
            tensor.mul_(local)


class SkipLimit:
    """Counts skipped steps, and ends a run that no longer trains."""

    def __init__(self) -> None:
        self.skipped = 0
        self._last: collections.deque[bool] = collections.deque(maxlen=100)

    def step(self, skipped: bool) -> None:
        """
        Raises:
            FloatingPointError: too many steps were skipped of late.
        """
        self._last.append(skipped)
        if not skipped:
            return
        self.skipped += 1
        try:
            when = f"Iteration {get_event_storage().iter}: "
        except AssertionError:  # a loop of its own
            when = ""
        logger.warning(
            f"{when}a gradient is NaN or inf, the step is skipped ({self.skipped} so far)."
        )
        row = [*self._last][-MAX_SKIPPED:]
        if sum(self._last) > MAX_SHARE or (len(row) == MAX_SKIPPED and all(row)):
            raise FloatingPointError(
                f"{when}{sum(self._last)} of the last {len(self._last)} steps "
                "were skipped, since a gradient was NaN or inf: the model has diverged, and "
                "SOLVER.ON_NONFINITE skip (train.on_nonfinite) does not help. Go on from a "
                "checkpoint before that, with a lower SOLVER.BASE_LR, a longer warm-up or "
                "SOLVER.CLIP_GRADIENTS."
            )


def skip_nonfinite_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Leave out each step of `optimizer` whose gradient has a NaN or inf, and say so in the log;
    where it is most of them, FloatingPointError.

    DDP's workers hold the same averaged gradient, so all of them decide alike; those of a sharded
    model tell each other, by one number per step. The buffers of
    `model`, such as BatchNorm's statistics, go back to what they were after the last step taken.

    Raises:
        ValueError: an optimizer that Detectron2 clips.
    """
    if optimizer in _SKIPPING:
        return
    if type(optimizer).__name__.endswith("WithGradientClip"):
        raise ValueError(
            "SOLVER.ON_NONFINITE skip (train.on_nonfinite): the optimizer is clipped by "
            "Detectron2's maybe_add_gradient_clipping, which makes an inf finite before the check "
            "can see it. Clip by agvm_d2.solver.clip_gradients(optimizer, clip_type, clip_value) "
            "instead."
        )
    limit = SkipLimit()
    good = [buffer.clone() for buffer in model.buffers()]
    # Weights are often loaded after the optimizer is built.
    model.register_load_state_dict_post_hook(lambda *_: _copy(good, [*model.buffers()]))

    @torch.no_grad()
    def skipped() -> None:
        _copy([*model.buffers()], good)
        limit.step(skipped=True)

    _SKIPPING[optimizer] = skipped
    counts: list[Any] = []  # of a step left out, each group's: pytorch-optimizer's count it, too

    def recount(*_: Any) -> None:
        for group, count in zip(optimizer.param_groups, counts, strict=False):
            if count is None:
                group.pop("step", None)
            else:
                group["step"] = count
        counts.clear()

    @torch.no_grad()
    def skip_if_nonfinite(*_: Any) -> None:
        unscale(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:  # none of this step, or a base class's `step` inside a step left out
            return
        if _finite(grads):
            _copy(good, [*model.buffers()])
            limit.step(skipped=False)
            return
        for param in params:
            param.grad = None  # then there is nothing to step by
        counts[:] = [copy.deepcopy(group.get("step")) for group in optimizer.param_groups]
        skipped()

    optimizer.register_step_pre_hook(skip_if_nonfinite)
    optimizer.register_step_post_hook(recount)


def step_left_out(optimizer: torch.optim.Optimizer) -> None:
    """A GradScaler did not call the step of an optimizer that `skip_nonfinite_steps` has changed.

    Raises:
        FloatingPointError: too many steps were skipped of late.
    """
    _SKIPPING[optimizer]()
