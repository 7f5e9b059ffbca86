import errno
import itertools
import random
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from detectron2.data import build, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from toy_d2 import toy_config

from agvm_d2.d2.checks import SAMPLERS
from agvm_d2.d2.loader import (
    BadImageError,
    IterationSeeder,
    ResumableLoader,
    build_train_loader,
    check_resumable,
    resumable_by,
    seed_everything,
)


def dicts(num=10):
    """Wide and not, by turns."""
    return [
        {"file_name": f"{i}.png", "width": 2 + i % 2, "height": 2, "number": i} for i in range(num)
    ]


def mapper(record):
    record["drawn"] = (float(torch.rand(())), np.random.rand(), random.random())
    return record


def make(num_workers=0, grouping=True, batch=3, mapper=mapper, num=10, **options):
    return ResumableLoader(
        dicts(num),
        mapper,
        batch,
        lambda seed: TrainingSampler(num, seed=seed),
        num_workers,
        grouping,
        seed=5,
        **options,
    )


def first(loader, num):
    batches = itertools.islice(iter(loader), num)
    return [[(d["number"], d["drawn"]) for d in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [False, True])
def test_any_place_can_be_gone_back_to(grouping):
    whole = first(make(grouping=grouping), 30)
    assert len({x for batch in whole for x in batch}) == 90  # each image is augmented anew
    for start in range(20):
        loader = make(grouping=grouping)
        loader.seek(start, 5)
        assert first(loader, 10) == whole[start : start + 10]


@pytest.mark.parametrize("grouping", [False, True])
def test_the_number_of_processes_changes_nothing(grouping):
    assert first(make(2, grouping), 8) == first(make(0, grouping), 8)


def test_grouping_keeps_wide_images_together_and_an_epoch_whole():
    for batch in first(make(), 20):
        assert len({number % 2 for number, _ in batch}) == 1
    plain = [number for batch in first(make(grouping=False, batch=5), 2) for number, _ in batch]
    assert sorted(plain) == list(range(10))


def test_a_mapper_that_turns_images_changes_no_group():
    def turned(record):
        if torch.rand(()) < 0.5:
            record["width"], record["height"] = record["height"], record["width"]
        return mapper(record)

    whole = first(make(mapper=turned), 12)
    loader = make(mapper=turned)
    loader.seek(7, 5)
    assert first(loader, 5) == whole[7:]


def test_the_trainers_random_numbers_are_left_alone():
    seed_everything(3)
    wanted = mapper({})
    seed_everything(3)
    first(make(), 3)
    first(make(1), 3)
    assert mapper({}) == wanted


def drawn(loader):
    return {x for batch in first(loader, 5) for _, numbers in batch for x in numbers}


def test_each_worker_and_each_seed_draws_numbers_of_its_own(monkeypatch):
    one = drawn(make())
    other = make()
    other.seek(0, 6)
    assert not one & drawn(other)
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    assert not one & drawn(make())


def test_a_mapper_may_change_its_record():
    def counts(record):
        record["drawn"] = record.get("drawn", 0) + 1
        return record

    assert {readings for batch in first(make(mapper=counts), 8) for _, readings in batch} == {1}


def bad_at_4(record):
    if record["number"] == 4:
        raise OSError("image file is truncated")
    return mapper(record)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_stops_and_is_named(num_workers):
    message = "fails: '4.png': OSError: image file is truncated.*ON_BAD_IMAGE skip"
    with pytest.raises(BadImageError, match=message):
        first(make(num_workers, mapper=bad_at_4), 10)


def test_a_bad_image_is_skipped_named_and_counted(d2_log):
    loader = make(mapper=bad_at_4, on_bad_image="skip")
    found = [number for batch in first(loader, 10) for number, _ in batch]
    assert 4 not in found and len(found) == 30
    batches = itertools.islice(make(mapper=bad_at_4, on_bad_image="skip"), 10)
    assert {tuple(sample) for batch in batches for sample in batch} == {
        ("file_name", "width", "height", "number", "drawn")  # nothing of the loader's own
    }
    assert loader.skipped == found.count(6) - sum(n == 6 for n, _ in sum(first(make(), 10), []))
    assert "Skipped image 1 of this worker so far: '4.png': OSError" in d2_log.text
    assert f"Skipped image {loader.skipped} of this worker so far: '4.png': could" in d2_log.text
    # And the batches are those of the other loader, so that a resumed run is exact.
    again = make(mapper=bad_at_4, on_bad_image="skip")
    again.seek(4, 5)
    assert first(again, 3) == first(make(mapper=bad_at_4, on_bad_image="skip"), 7)[4:]


class Reads:
    """Image 4 cannot be read, of 5 one draw in two cannot; `path` has a line for each try."""

    def __init__(self, path):
        self.path = path

    def __call__(self, record):
        with open(self.path, "a") as f:
            f.write(f"{record['number']}\n")
        if record["number"] == 5 and torch.rand(()) < 0.5:
            raise ValueError("an empty crop")
        return bad_at_4(record)

    def of(self, number):
        return self.path.read_text().split().count(str(number))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_cannot_be_read_is_tried_once(num_workers, tmp_path, d2_log):
    reads = Reads(tmp_path / "reads")
    loader = make(num_workers, mapper=reads, on_bad_image="skip")
    whole = first(loader, 20)
    # At the same moment both processes may try it.
    assert 1 <= reads.of(4) <= max(1, num_workers) and reads.of(5) > 5
    assert loader.bad_images() == {4: "4.png"}  # a crop comes out differently the next time

    saved = seeder_at(9, loader).state_dict()
    (tmp_path / "reads").unlink()
    again = make(num_workers, mapper=reads, on_bad_image="skip")
    seeder_at(10, again, state=saved).before_train()
    assert first(again, 10) == whole[10:] and reads.of(4) == 0
    assert "1 images could not be read before and are not tried again; the first is '4.png'" in (
        d2_log.text
    )

    other = make(mapper=reads, on_bad_image="skip")  # of another dataset
    seeder_at(10, other, state={**saved, "bad_images": {4: "x.png", 99: "y.png"}}).before_train()
    assert other.bad_images() == {}
    stops = make(mapper=reads)
    seeder_at(10, stops, state=saved).before_train()
    with pytest.raises(BadImageError):
        first(stops, 10)


def test_a_disk_that_is_away_is_tried_again():
    def away(record):
        if record["number"] == 4:
            raise OSError(errno.EIO, "Input/output error")
        return mapper(record)

    loader = make(mapper=away, on_bad_image="skip")
    first(loader, 10)
    assert loader.skipped and loader.bad_images() == {}


def test_any_other_word_for_skip_is_refused():
    with pytest.raises(ValueError, match="on_bad_image: found 'Stop', .*one of stop, skip"):
        make(on_bad_image="Stop")


def test_nothing_but_bad_images_is_an_error():
    def bad(record):
        raise ValueError("empty")

    with pytest.raises(
        BadImageError,
        match="None of 5 images in a row can be read; the last: '.*ValueError: empty",
    ):
        first(make(mapper=bad, on_bad_image="skip"), 1)
    with pytest.raises(BadImageError, match="None of 101 images in a row"):  # not a million
        first(make(mapper=bad, on_bad_image="skip", num=500), 1)


def test_records_without_a_size(tmp_path):
    """Semantic segmentation's: the mapper learns it from the image."""
    from PIL import Image

    records = []
    for i in range(8):
        image = Image.new("RGB", (4 + 4 * (i % 2), 6))
        exif = image.getexif()
        exif[0x0112] = 6 if i == 3 else 1  # turned by a quarter: 6 x 8, not wide
        image.save(tmp_path / f"{i}.jpg", exif=exif)
        records.append({"file_name": str(tmp_path / f"{i}.jpg"), "number": i})

    def sized(record):
        wide = record["number"] % 2 == 1 and record["number"] != 3
        return {**mapper(record), "width": 8 if wide else 4, "height": 6}

    def loader():
        return ResumableLoader(records, sized, 2, lambda seed: TrainingSampler(8, seed=seed))

    whole = first(loader(), 12)
    for start in (1, 5):
        again = loader()
        again.seek(start, 0)
        assert first(again, 4) == whole[start : start + 4]


def test_a_mapper_may_leave_images_out(d2_log):
    def even_only(record):
        return mapper(record) if record["number"] % 4 < 2 else None

    found = [number for batch in first(make(mapper=even_only), 10) for number, _ in batch]
    assert len(found) == 30 and all(number % 4 < 2 for number in found)
    assert "Skipped" not in d2_log.text


@pytest.mark.parametrize("num_workers, prefetch", [(0, None), (1, 6), (4, 2)])
def test_about_two_batches_are_read_ahead(num_workers, prefetch):
    assert make(num_workers)._prefetch() == prefetch


class OwnSampler(TrainingSampler):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": OwnSampler(10)},
        {"collate_fn": list},
        {"dataset": torch.utils.data.TensorDataset(torch.arange(10))},
        {"timeout": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_to_be_resumed_is_detectron2s(options, tmp_path, d2_log):
    options = {"dataset": dicts(), **options}
    loader = build_train_loader(toy_config(tmp_path), mapper=mapper, **options)
    assert not isinstance(loader, ResumableLoader)
    check_resumable(loader, [], "KEY", "stop", "Do this")
    assert "will read images in a new order. Do this to make a resume exact." in d2_log.text
    with pytest.raises(ValueError, match="^KEY: found 'skip', .*own .*Do this, or set the key"):
        check_resumable(loader, [], "KEY", "skip", "Do this")
    check_resumable(loader, [make()], "KEY", "skip", "Do this")  # which the project has wrapped


def test_detectron2s_function_is_put_back(tmp_path):
    theirs = build.build_batch_data_loader
    with resumable_by(toy_config(tmp_path)) as made, resumable_by(toy_config(tmp_path)) as inner:
        assert build.build_batch_data_loader is not theirs
        options = {"mapper": mapper, "total_batch_size": 2, "pin_memory": True}
        loader = build_detection_train_loader(dicts(), **options)
        other = build_detection_train_loader(dicts(), **options)
    assert made == inner == [loader, other] and build.build_batch_data_loader is theirs
    assert not {x for b in first(loader, 5) for x in b} & {x for b in first(other, 5) for x in b}
    assert not isinstance(build_detection_train_loader(dicts(), **options), ResumableLoader)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_a_config(digits, tmp_path, sampler):
    import agvm_d2.data  # noqa: F401

    cfg = toy_config(
        tmp_path,
        DATASETS__TRAIN=("digits_train",),
        DATALOADER__SAMPLER_TRAIN=sampler,
        DATALOADER__REPEAT_THRESHOLD=0.5,
        DATALOADER__NUM_WORKERS=0,
        SEED=3,
        SOLVER__IMS_PER_BATCH=4,
    )
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.29  # which Detectron2's own config lacks, as this
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("digits_train", 1.5)]
    names = [
        [[d["file_name"] for d in b] for b in itertools.islice(iter(loader), 5)]
        for loader in (build_train_loader(cfg), build_train_loader(cfg))
    ]
    assert names[0] == names[1] and len(names[0][0]) == 4
    resumed = build_train_loader(cfg)
    resumed.seek(3, seed=3)
    assert [d["file_name"] for d in next(iter(resumed))] == names[0][3]
    loader = build_train_loader(cfg, mapper=lambda record: {**record, "mine": record["file_name"]})
    mine = [[d["mine"] for d in b] for b in itertools.islice(iter(loader), 5)]
    assert mine == names[0]


def by_config(tmp_path, monkeypatch, workers=2, **options):
    """The loader built, of one of `workers`, and what the dataset was asked for."""
    asked = {}

    def get_dicts(names, **options):
        asked.update(options, names=names)
        records = dicts()
        for record in records:
            record["annotations"] = [{"category_id": int(record["number"] == 3)}]
        return records

    monkeypatch.setattr("detectron2.data.build.get_detection_dataset_dicts", get_dicts)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: workers)
    monkeypatch.setattr("detectron2.utils.comm.shared_random_seed", lambda: 0)
    cfg = toy_config(tmp_path, SEED=3, DATASETS__TRAIN=("some",), **options)
    return build_train_loader(cfg, mapper=mapper), asked


def test_each_key_of_a_config_is_heard(tmp_path, monkeypatch):
    loader, asked = by_config(tmp_path, monkeypatch)
    assert asked == {
        "names": ("some",), "filter_empty": True, "min_keypoints": 0, "proposal_files": None,
    }  # fmt: skip
    found = (loader.batch_size, loader.seed, loader.grouping, loader._images.on_bad_image)
    assert found == (4, 3, True, "stop") and loader._num_workers == 4
    loader, asked = by_config(
        tmp_path,
        monkeypatch,
        SOLVER__IMS_PER_BATCH=6,
        DATALOADER__FILTER_EMPTY_ANNOTATIONS=False,
        DATALOADER__ASPECT_RATIO_GROUPING=False,
        DATALOADER__ON_BAD_IMAGE="skip",
        DATALOADER__NUM_WORKERS=1,
        MODEL__KEYPOINT_ON=True,
        MODEL__ROI_KEYPOINT_HEAD__MIN_KEYPOINTS_PER_IMAGE=5,
        MODEL__LOAD_PROPOSALS=True,
        DATASETS__PROPOSAL_FILES_TRAIN=("p.pkl",),
    )
    assert asked == {
        "names": ("some",), "filter_empty": False, "min_keypoints": 5, "proposal_files": ("p.pkl",),
    }  # fmt: skip
    found = (loader.batch_size, loader.seed, loader.grouping, loader._images.on_bad_image)
    assert found == (3, 3, False, "skip") and loader._num_workers == 1


@pytest.mark.parametrize("threshold, times", [(0.4, 2), (0.0, 1)])
def test_rare_categories_are_repeated_as_the_config_says(threshold, times, tmp_path, monkeypatch):
    # In one of ten images: sqrt(0.4 / 0.1) = 2 times.
    options = {"SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "REPEAT_THRESHOLD": threshold}
    options = {f"DATALOADER__{key}": value for key, value in options.items()}
    loader, _ = by_config(tmp_path, monkeypatch, workers=1, **options)
    epoch = list(itertools.islice(iter(loader.make_sampler(3)), 9 + times))
    assert sorted(epoch) == sorted([*range(10), *[3] * (times - 1)])


# Seeds of iterations


def seeder_at(iteration, loader=None, seed=0, state=None):
    seeder = IterationSeeder(loader, seed)
    if state:
        seeder.load_state_dict(state)
    seeder.trainer = SimpleNamespace(start_iter=iteration, iter=iteration)
    return seeder


def test_a_resumed_loader_is_brought_to_its_place_with_the_saved_seed(d2_log):
    loader = make()
    saved = {"seed": 9, "workers": 1}
    seeder_at(4, loader, state=saved).before_train()
    assert (loader.start, loader.seed) == (4, 9)
    other = make()
    other.seek(0, 9)
    assert first(loader, 3) == first(other, 7)[4:]
    assert "shared out anew" not in d2_log.text


def test_another_number_of_workers_is_said(d2_log):
    seeder_at(4, state={"seed": 9, "workers": 2})
    assert "Resumed with 1 workers, saved with 2: " in d2_log.text


def test_random_numbers_of_an_iteration_are_its_own_and_each_workers(monkeypatch):
    def numbers(*args, **kwargs):
        seeder_at(*args, **kwargs).before_step()
        return mapper({})["drawn"]

    one = numbers(4, seed=1)
    assert numbers(4, seed=1) == one
    assert numbers(4, state={"seed": 1, "workers": 1}) == one
    others = [numbers(5, seed=1), numbers(4, seed=2)]
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    others.append(numbers(4, seed=1))
    assert len({x for found in (one, *others) for x in found}) == 12
