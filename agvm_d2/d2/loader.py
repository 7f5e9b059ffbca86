"""Detectron2's training loader, with a place that a resumed run can go back to.

The images of iteration i, and the random numbers of their augmentations, depend on the seed and i
alone: not on how many loader processes there are, nor on when the run was interrupted.
"""

from __future__ import annotations
import contextlib
import copy
import errno
import functools
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
import detectron2.data.build as detectron2_build
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.common import DatasetFromList, MapDataset
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..validate import one_of
from .handover import packer, raise_open_files, unpacked
from .preemption import leave_signals_to_the_trainer
from .samples import SampleCheck

logger = logging.getLogger("detectron2.agvm_d2")

# Whose order follows from `_seed`; the weighted ones of a config are of the second type.
SAMPLERS = (TrainingSampler, RepeatFactorTrainingSampler, RandomSubsetTrainingSampler)
# Options of torch's DataLoader that change no sample.
NEUTRAL = {"drop_last", "pin_memory", "prefetch_factor", "persistent_workers", "seed"}
MAX_TRIES = 100  # bad images in a row: then it is not the images
SKIPPED = "agvm_d2.skipped"  # key of a sample that stands in for a bad one
WIDE = "agvm_d2.wide"  # key of a sample whose record is, or is not, wider than high
ODD = "agvm_d2.odd"  # key of a sample whose file looks odd
MAX_ODD = 10  # images that are named
POLYGON_HINT = (
    " If masks are run-length codes (RLE), set INPUT.MASK_FORMAT bitmask (in a LazyConfig "
    "dataloader.train.mapper.instance_mask_format=bitmask)"
)


def mixed_seed(*numbers: int) -> int:
    """One 32-bit seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def patched(module: Any, name: str, function: Callable) -> Iterator[None]:
    """The module calls `function` where it calls its own of this name."""
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """In a loader's process nothing else draws random numbers; in the trainer's, put them back."""
    own = get_worker_info() is None
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate()) if own else None
    torch.default_generator.manual_seed(seed)  # not CUDA's, which no mapper draws from
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        if states:
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])


def shared_seed(seed: int) -> int:
    """`seed`, or, below 0, one drawn for all workers."""
    return seed if seed >= 0 else comm.shared_random_seed()


class BadImageError(ValueError):
    """An image or its annotations cannot be read."""


def _is_wide(record: dict) -> bool:
    """Wider than high; semantic segmentation's records do not tell, so the file does."""
    if "width" in record:
        return record["width"] > record["height"]
    try:
        with Image.open(record["file_name"]) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF's orientation, as Detectron2 reads
    except OSError:  # unreadable: in no batch
        return False
    return height > width if turned else width > height


def _lasts(error: Exception, mapped: bool) -> bool:
    """Whether it comes at each reading: the record's or the file's, not of a draw of the mapper's
    nor of a disk that is away for a moment."""
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOENT)  # None: PIL's
    return not mapped


class _Images(Dataset):
    """(place in the stream, index) -> the mapped image."""

    def __init__(
        self,
        dicts: DatasetFromList,
        mapper: Callable,
        on_bad_image: str,
        grouping: bool,
        check: SampleCheck,
    ):
        self.dicts, self.mapper, self.on_bad_image = dicts, mapper, on_bad_image
        self.grouping, self.check = grouping, check
        self.seed, self.rank = 0, comm.get_rank()
        self.bad = torch.zeros(len(dicts), dtype=torch.bool)  # not to be read again
        if on_bad_image == "skip":
            self.bad.share_memory_()  # the processes of the loader find them, and all know them

    def __getitem__(self, key: tuple[int, int]) -> dict:
        place, index = key
        with _seeded(mixed_seed(self.seed, 0, self.rank, place)):
            try:
                sample = self._read(index)
            except BadImageError as error:
                if self.on_bad_image == "stop":
                    raise BadImageError(
                        f"The image or the mapper fails: {error}. Repair it, or set "
                        "DATALOADER.ON_BAD_IMAGE skip (train.on_bad_image) to go on without."
                    ) from error
                return self._stand_in(index, [str(error)])
            return self._stand_in(index, []) if sample is None else sample

    def _read(self, index: int) -> dict | None:
        """None where the mapper leaves an image out, as Detectron2 allows."""
        record = self.dicts[index]
        name = record.get("file_name", f"number {index}")
        if self.bad[index]:
            raise BadImageError(f"'{name}': could not be read before")
        mapped = False
        try:
            odd = self.check.record(record)  # before any C code sees it
            mapped = True
            sized = self.grouping and "width" in record
            wide = sized and _is_wide(record)  # now: the mapper may change it
            sample = self.mapper(record)
            if sample is not None:
                self.check.sample(sample, record)
                if self.grouping:
                    sample[WIDE] = wide if sized else sample["width"] > sample["height"]
        except Exception as error:
            if self.on_bad_image == "skip" and _lasts(error, mapped):
                self.bad[index] = True
            hint = POLYGON_HINT if "mask_format=='polygon'" in str(error) else ""
            raise BadImageError(f"'{name}': {type(error).__name__}: {error}{hint}") from error
        if odd and sample is not None:
            sample[ODD] = f"'{name}': {odd}"
        return sample

    def _stand_in(self, index: int, skipped: list[str]) -> dict:
        """The next image of the same shape, which so takes the place in the same batch."""
        wide = self.grouping and _is_wide(self.dicts[index])
        tried = 0
        for other in itertools.chain(range(index + 1, len(self.dicts)), range(index)):
            if self.grouping and _is_wide(self.dicts[other]) != wide:
                continue
            try:
                sample = self._read(other)
            except BadImageError as error:
                skipped.append(str(error))
            else:
                if sample is not None:
                    return {**sample, SKIPPED: skipped}
            tried += 1
            if tried == MAX_TRIES:
                break
        last = f"; the last: {skipped[-1]}" if skipped else ", all were left out by the mapper"
        raise BadImageError(f"None of {tried + 1} images in a row can be read{last}.")


class _Stream(Sampler):
    """(place, index) from `start` batches on."""

    def __init__(self, loader: ResumableLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[int, int]]:
        loader = self.loader
        stream = enumerate(iter(loader.make_sampler(loader.seed)))
        size = loader.batch_size
        if not loader.grouping:
            return itertools.islice(stream, loader.start * size, None)
        # What `_grouped` did so far: what it still holds comes first.
        held: tuple[list, list] = ([], [])
        wide = loader.wide() if loader.start else []
        batches = 0
        while batches < loader.start:
            item = next(stream)
            group = held[wide[item[1]]]
            group.append(item)
            if len(group) == size:
                group.clear()
                batches += 1
        return itertools.chain(*held, stream)


class ResumableLoader:
    """Infinite batches, each a list of mapped dicts: `iter` starts with the batch of iteration
    `start`.

    >>> dicts = [{"file_name": name} for name in "abcdef"]
    >>> in_order = lambda seed: TrainingSampler(len(dicts), shuffle=False)
    >>> loader = ResumableLoader(dicts, dict, 2, in_order, grouping=False)
    >>> [sample["file_name"] for sample in next(iter(loader))]
    ['a', 'b']
    >>> loader.seek(5, seed=0)
    >>> [sample["file_name"] for sample in next(iter(loader))]
    ['e', 'f']

    Args:
        dicts: Detectron2's dataset dicts.
        mapper: dict -> dict, as `DatasetMapper`; may draw from torch, numpy and random.
        batch_size: images of one worker in one iteration.
        make_sampler: seed -> sampler of this worker's indices, such as `TrainingSampler`.
        grouping: batches of images that are all wide or all not (DATALOADER.ASPECT_RATIO_GROUPING).
        seed: the same in all workers.
        on_bad_image: "stop", or "skip": take the next one, say which and how many.
        check: of each record and mapped sample; none given: one that knows no classes.

    Raises:
        ValueError: another `on_bad_image`.
        BadImageError: (on iteration) names the file.
    """

    def __init__(
        self,
        dicts: list[dict] | DatasetFromList,
        mapper: Callable[[dict], dict],
        batch_size: int,
        make_sampler: Callable[[int], Sampler],
        num_workers: int = 0,
        grouping: bool = True,
        seed: int = 0,
        on_bad_image: str = "stop",
        check: SampleCheck | None = None,
    ):
        one_of("on_bad_image", on_bad_image, ("stop", "skip"))
        self.batch_size, self.grouping, self.make_sampler = batch_size, grouping, make_sampler
        self.seed, self.start, self.skipped = seed, 0, 0
        self._num_workers, self._odd = num_workers, 0
        # Serialized: shared by the loader's processes, and a new object at each reading.
        records = (
            dicts if isinstance(dicts, DatasetFromList) else DatasetFromList(dicts, copy=False)
        )
        self._images = _Images(records, mapper, on_bad_image, grouping, check or SampleCheck())

    def wide(self) -> list[bool]:
        """Of each image, whether it is wider than high."""
        return [_is_wide(record) for record in self._images.dicts]

    def seek(self, iteration: int, seed: int) -> None:
        """The next `iter` starts with this iteration's batch."""
        self.start, self.seed = iteration, seed

    def bad_images(self) -> dict[int, str]:
        """Index -> file name of those that "skip" has found bad and does not read again."""
        images = self._images
        found = images.bad.nonzero().flatten().tolist()
        return {index: images.dicts[index].get("file_name", "") for index in found}

    def leave_out(self, bad: dict[int, str]) -> None:
        """With "skip": do not read what `bad_images` of an earlier run has found."""
        images, found = self._images, []
        if images.on_bad_image != "skip":
            return
        for index, name in bad.items():  # of another dataset, another name
            if index < len(images.dicts) and images.dicts[index].get("file_name", "") == name:
                images.bad[index] = True
                found.append(name)
        if found:
            logger.warning(
                f"{len(found)} images could not be read before and are not tried again; the first "
                f"is '{found[0]}'. ON_BAD_IMAGE stop tries them."
            )

    def _prefetch(self) -> int | None:
        """Images that each process reads ahead: two batches in all, as torch's default."""
        return max(2, -(-2 * self.batch_size // self._num_workers)) if self._num_workers else None

    def __iter__(self) -> Iterator[list[dict]]:
        self._images.seed = self.seed
        workers, prefetch = self._num_workers, self._prefetch()
        # Not batched here, so that the order does not depend on the number of processes.
        images = DataLoader(
            self._images,
            sampler=_Stream(self),
            batch_size=None,
            num_workers=workers,
            collate_fn=packer(workers * prefetch) if prefetch else _as_is,
            generator=torch.Generator(),  # or it draws a seed from the trainer's random numbers
            prefetch_factor=prefetch,
            worker_init_fn=leave_signals_to_the_trainer,
        )
        samples = unpacked(images) if workers else images
        if self.grouping:
            batches = _grouped(samples, self.batch_size)
        else:
            batches = _in_batches(samples, self.batch_size)
        for batch in batches:
            for sample in batch:
                for what in sample.pop(SKIPPED, ()):
                    self.skipped += 1
                    logger.warning(f"Skipped image {self.skipped} of this worker so far: {what}")
                if ODD in sample:
                    self._tell_odd(sample.pop(ODD))
            yield batch

    def _tell_odd(self, what: str) -> None:
        self._odd += 1
        if self._odd <= MAX_ODD:
            more = "; the next ones are not named" if self._odd == MAX_ODD else ""
            logger.warning(f"Odd image: {what}{more}")


class IterationSeeder(HookBase):
    """The same images and random numbers in an iteration, whether the run was resumed or not;
    with another batch size, the images that follow those seen.

    Args:
        loader: the trainer's; None: one that cannot be brought back to a place.
        seed: where there is no loader to take it from; the same in all workers.
    """

    def __init__(self, loader: ResumableLoader | None, seed: int = 0):
        self._loader = loader
        self._seed = loader.seed if loader else seed
        self._images: int | None = None  # that a resumed run has seen
        self._bad: dict[int, str] = {}
        self._shift = 0  # batches of the data before this iteration, less iterations

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if self._loader:
            if self._images is not None:  # rounded down: better some images again than left out
                self._shift = self._images // self._batch_size() - start
            self._loader.seek(start + self._shift, self._seed)
            self._loader.leave_out(self._bad)

    def before_step(self) -> None:
        seed_everything(mixed_seed(self._seed, 1, comm.get_rank(), self.trainer.iter))

    def _batch_size(self) -> int:
        """Of all workers."""
        assert self._loader is not None
        return self._loader.batch_size * comm.get_world_size()

    def state_dict(self) -> dict:
        state = {"seed": self._seed, "workers": comm.get_world_size()}
        if self._loader:
            state["bad_images"] = self._loader.bad_images()
        if self._loader and self.trainer is not None:  # not in one that has not trained
            state["images"] = (self.trainer.iter + 1 + self._shift) * self._batch_size()
        return state

    def load_state_dict(self, state: dict) -> None:
        self._seed = state["seed"]
        self._images = state.get("images")  # not in older checkpoints
        self._bad = state.get("bad_images", {})
        workers = comm.get_world_size()
        if workers != state["workers"]:
            logger.warning(
                f"Resumed with {workers} workers, saved with {state['workers']}: the images of an "
                "iteration are shared out anew; AGVM's factors go on."
            )


def _as_is(sample: Any) -> Any:
    return sample


def _in_batches(images: Iterable[dict], size: int) -> Iterator[list[dict]]:
    images = iter(images)
    while True:
        yield list(itertools.islice(images, size))


def _grouped(images: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """As Detectron2's AspectRatioGroupedDataset, by the records, which are known at a resume."""
    held: tuple[list, list] = ([], [])
    for image in images:
        group = held[image.pop(WIDE)]
        group.append(image)
        if len(group) == size:
            yield group[:]
            group.clear()


def build_train_loader(
    cfg: CfgNode, *, mapper: Callable[[dict], dict] | None = None, **options: Any
) -> ResumableLoader | Iterable[list[dict]]:
    """Detectron2's `build_detection_train_loader`, whose result is a ResumableLoader.

    Args:
        mapper: in place of `DatasetMapper(cfg, is_train=True)`.
        options: its others. With a `sampler` of another type than Detectron2's, a `collate_fn` or
            a `dataset` that is no list, the loader is Detectron2's own.
    """
    with resumable_by(cfg):
        return build_detection_train_loader(cfg, mapper=mapper, **options)


def resumable_by(cfg: CfgNode) -> contextlib.AbstractContextManager[list[ResumableLoader]]:
    """`resumable`, with the keys of a yacs config."""
    data = cfg.DATALOADER
    return resumable(cfg.DATASETS.TRAIN, cfg.SEED, data.ON_BAD_IMAGE, data.CHECK_DATASETS)


@contextlib.contextmanager
def resumable(
    names: Sequence[str], seed: int, on_bad_image: str, check_files: bool
) -> Iterator[list[ResumableLoader]]:
    """Within, Detectron2's `build_detection_train_loader` returns ResumableLoaders, whoever calls
    it and by whatever name it was imported; where one cannot do what is asked, Detectron2's own.

    Args:
        names: of the datasets, whose metadata the samples are checked by.
        seed: of the first loader, from which those of others come; below 0: drawn, for all
            workers.

    Yields:
        The ResumableLoaders that were built.
    """
    made: list[ResumableLoader] = []

    def build(dataset: Any, sampler: Any, total_batch_size: int, **options: Any) -> Any:
        asked = {k: v for k, v in options.items() if v is not None and k not in NEUTRAL}
        grouping = asked.pop("aspect_ratio_grouping", False)
        num_workers = asked.pop("num_workers", 0)
        records = getattr(dataset, "_dataset", None)
        fits = type(dataset) is MapDataset and isinstance(records, DatasetFromList)
        share, left = divmod(total_batch_size, comm.get_world_size())
        if asked or left or not fits or type(sampler) not in SAMPLERS:
            return before(dataset, sampler, total_batch_size, **options)
        raise_open_files()
        mapper = dataset._map_func._obj
        made.append(
            ResumableLoader(
                records,
                mapper,
                share,
                functools.partial(_reseeded, sampler),  # which must not keep the dataset alive
                num_workers,
                grouping,
                mixed_seed(made[0].seed, 2, len(made)) if made else shared_seed(seed),
                on_bad_image,
                SampleCheck.of(names, mapper, check_files),
            )
        )
        return made[-1]

    # Not build_detection_train_loader, which a project may have under a name in its own module, but
    # what that calls, which it looks up in Detectron2's.
    before: Any = detectron2_build.build_batch_data_loader
    if hasattr(before, "made"):  # within another `with`
        yield before.made
        return
    build.made = made  # type: ignore[attr-defined]
    with patched(detectron2_build, "build_batch_data_loader", build):
        yield made


def _reseeded(sampler: Any, seed: int) -> Any:
    if type(sampler) is RandomSubsetTrainingSampler:
        # Half an image more, so that int() comes to as many.
        ratio = min(1.0, (sampler._size_subset + 0.5) / sampler._size)
        return RandomSubsetTrainingSampler(sampler._size, ratio, sampler._shuffle, seed, seed)
    sampler = copy.copy(sampler)
    sampler._seed = seed
    return sampler


def check_resumable(
    loader: Iterable, made: Sequence[ResumableLoader], key: str, on_bad_image: str, way_out: str
) -> None:
    """Warn where a resumed run cannot go on with the images it would have seen.

    Args:
        loader: the trainer's.
        made: what `resumable` has built.
        key: of `on_bad_image`.
        way_out: what to do, as a sentence without its end.

    Raises:
        ValueError: "skip", and nothing of this package's reads the images.
    """
    if isinstance(loader, ResumableLoader):
        return
    kind = type(loader).__name__
    if on_bad_image == "skip" and not made:
        raise ValueError(
            f"{key}: found 'skip', but the training loader is the project's own ({kind}), which "
            f'does not know the key. {way_out}, or set the key to "stop".'
        )
    logger.warning(
        f"The training loader is the project's own ({kind}): a resumed run will read images in a "
        f"new order. {way_out} to make a resume exact."
    )
