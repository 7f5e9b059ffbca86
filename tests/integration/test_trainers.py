"""AGVM in real Detectron2 trainers with several workers, and on a real detector."""

import copy
import pytest
import reference
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import SimpleTrainer, create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from toy import ToyDetector, factors
from toy_d2 import RCNNTrainer, ToyLoader, agvm_hook, rcnn_config, toy_config, train, weights

import agvm_d2.data  # noqa: F401
from agvm_d2 import AGVMHook, AGVMTrainerMixin, split_param_groups

MICRO = {"SOLVER__MICRO_BATCH_SIZE": 2}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


# The two ways of getting gradients


def run_in_worker(options, output_dir):
    trainer = train(toy_config(output_dir, **options))
    scale = agvm_hook(trainer).modulator.factors if trainer.cfg.AGVM.ENABLED else None
    return weights(trainer), scale, {g["lr"] for g in trainer.optimizer.param_groups}


def test_two_workers_and_two_micro_batches_agree(workers, tmp_path):
    one = train(toy_config(tmp_path / "one", SOLVER__MICRO_BATCH_SIZE=4))
    two = workers(2).run(run_in_worker, {}, tmp_path / "two")
    scale = agvm_hook(one).modulator.factors
    assert torch.equal(two[0][1], two[1][1]) and same(two[0][0], two[1][0])
    assert (scale[1:] != 1).all()
    torch.testing.assert_close(two[0][1], scale, rtol=1e-4, atol=1e-4)
    for key, value in weights(one).items():
        torch.testing.assert_close(two[0][0][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, MICRO], ids=["", "micro"])
def test_monitor_is_bit_identical_to_off_with_two_workers(workers, tmp_path, options):
    pool = workers(2)
    off = pool.run(run_in_worker, {"AGVM__ENABLED": False, **options}, tmp_path / "off")
    monitor = pool.run(run_in_worker, {"AGVM__MODE": "monitor", **options}, tmp_path / "monitor")
    assert same(off[0][0], monitor[0][0])
    assert (monitor[0][1][1:] != 1).all()
    assert monitor[0][2] == {0.05}


def lazyconfig_loop(compressed):
    """In a worker: the trainer of Detectron2's lazyconfig_train_net; its factors."""
    model = ToyDetector()
    optimizer = split_param_groups(torch.optim.SGD(model.parameters(), lr=0.05), model)
    ddp = create_ddp_model(model, fp16_compression=compressed, device_ids=None)
    trainer = SimpleTrainer(ddp, ToyLoader(8, comm.get_rank(), 2), optimizer)
    hook = AGVMHook(ddp, optimizer, interval=1, momentum=0.5, batch_size=8)
    trainer.register_hooks([hook])
    trainer.train(0, 1)
    return hook.modulator.factors


@pytest.mark.parametrize("compressed", [False, True])
def test_a_simple_trainer_under_ddp_also_with_its_own_compression(workers, compressed):
    results = workers(2).run(lazyconfig_loop, compressed)
    data = next(iter(ToyLoader(8)))
    wanted = factors(ToyDetector(), [data[:4], data[4:]])
    for scale in results:
        # Compressed gradients are averaged in float16.
        assert scale.tolist() == pytest.approx(
            list(wanted.values()), rel=1e-2 if compressed else 1e-4
        )
    assert torch.equal(results[0], results[1])


class FixedBatchTrainer(RCNNTrainer):
    """The thin Faster R-CNN on one fixed batch of digits."""

    @classmethod
    def build_train_loader(cls, cfg):
        return [fixed_batch(cfg)[comm.get_rank() :: comm.get_world_size()]] * 3


def fixed_batch(cfg):
    mapper = DatasetMapper(cfg, is_train=True)
    return [mapper(copy.deepcopy(d)) for d in DatasetCatalog.get("digits_train")[:4]]


def faster_rcnn_config(output_dir, **options):
    fixed = {
        # Sampling takes all anchors and proposals, so that no loss is random.
        "MODEL__RPN__BATCH_SIZE_PER_IMAGE": 10**6,
        "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 10**6,
        "SOLVER__CLIP_GRADIENTS__ENABLED": False,
        "SOLVER__WARMUP_METHOD": "linear",
        "SOLVER__BASE_LR": 0.001,
        "SOLVER__MAX_ITER": 1,
        "AGVM__START_ITER": 0,
        "AGVM__MOMENTUM": 0.5,
        "AGVM__RATIO_RANGE": (0.001, 1000.0),  # or the bounds would hide the variances
    }
    return rcnn_config(output_dir, **{**fixed, **options})


def faster_rcnn_step(output_dir, options):
    """In a worker or here: one iteration from fixed weights; the moments and factors."""
    torch.manual_seed(0)
    trainer = FixedBatchTrainer(faster_rcnn_config(output_dir, **options))
    trainer.train()
    modulator = agvm_hook(trainer).modulator
    return modulator.last.unit_sq, modulator.last.mean_sq, modulator.factors


def test_faster_rcnn_in_two_workers_in_micro_batches_and_in_the_reference(
    digits, workers, tmp_path
):
    ranks = workers(2).run(faster_rcnn_step, tmp_path / "two", {})
    # Worker r has images r and r + 2; so must micro-batch r.
    cfg = faster_rcnn_config(tmp_path / "one", SOLVER__MICRO_BATCH_SIZE=2)

    class Reordered(FixedBatchTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            data = fixed_batch(cfg)
            return [data[0::2] + data[1::2]] * 3

    torch.manual_seed(0)
    one = Reordered(cfg)
    start = copy.deepcopy(one.model)
    one.train()
    modulator = agvm_hook(one).modulator
    found = (modulator.last.unit_sq, modulator.last.mean_sq, modulator.factors)

    data = fixed_batch(cfg)
    with EventStorage(0):
        gradients = reference.unit_gradients(
            start, lambda model, unit: sum(model(unit).values()), [data[0::2], data[1::2]]
        )
    prefixes = {
        "backbone": "backbone.bottom_up",
        "fpn": "backbone.fpn_",
        "rpn": "proposal_generator",
        "box_head": "roi_heads",
    }
    found_in = {
        module: reference.flatten(gradients, [n for n in gradients[0] if n.startswith(prefix)])
        for module, prefix in prefixes.items()
    }
    variances = {m: reference.pairwise_variance(v) for m, v in found_in.items()}
    scale = reference.factors(dict.fromkeys(found_in, 1.0), variances, "backbone", 0.5, (1e-3, 1e3))
    wanted = [*zip(*map(reference.moments, found_in.values())), tuple(scale.values())]
    wanted = [torch.tensor(v, dtype=torch.float64) for v in wanted]
    assert len(set(scale.values())) == 4
    for result in (*ranks, found):
        for value, exact in zip(result, wanted, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))


class EmptyOnOneTrainer(FixedBatchTrainer):
    """Worker 0 has three images, worker 1 one without annotations."""

    @classmethod
    def build_train_loader(cls, cfg):
        data = fixed_batch(cfg)
        data[3]["instances"] = data[3]["instances"][:0]
        return [data[:3] if comm.get_rank() == 0 else data[3:]] * 3


def empty_on_one(output_dir):
    torch.manual_seed(0)
    trainer = EmptyOnOneTrainer(
        faster_rcnn_config(output_dir, SOLVER__MAX_ITER=3, AGVM__INTERVAL=1)
    )
    trainer.train()
    modulator = agvm_hook(trainer).modulator
    return modulator.variance, modulator.factors, [p.detach() for p in trainer.model.parameters()]


def test_unequal_batches_and_a_worker_without_annotations(digits, workers, tmp_path):
    one, other = workers(2).run(empty_on_one, tmp_path)
    assert (one[0] > 0).all() and one[0].isfinite().all() and (one[1] != 1).sum() == 3
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for a, b in zip(one[2], other[2], strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


# Other projects


def test_detectron2_s_own_train_net_by_the_mixin_alone(digits, tmp_path):
    stock = pytest.importorskip("tools.train_net", reason="only the wheel ships Detectron2's tools")

    class Trainer(AGVMTrainerMixin, stock.Trainer):
        pass

    cfg = faster_rcnn_config(tmp_path, SOLVER__MICRO_BATCH_SIZE=2, SOLVER__MAX_ITER=2)
    cfg.DATASETS.TEST = ("digits_val",)
    trainer = train(cfg, Trainer)
    assert (agvm_hook(trainer).modulator.factors[1:] != 1).all()
    assert "bbox" in trainer._last_eval_results
