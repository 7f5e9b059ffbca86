"""Detectron2's training loader, with a place that a resumed run can go back to.

The images of iteration i, and the random numbers of their augmentations, depend on the seed and i
alone: not on how many loader processes there are, nor on when the run was interrupted.
"""

from __future__ import annotations
import contextlib
import functools
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.common import AspectRatioGroupedDataset, DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..validate import one_of
from .handover import packer, raise_open_files, unpacked
from .preemption import leave_signals_to_the_trainer
from .samples import SampleCheck

logger = logging.getLogger("detectron2.agvm_d2")

MAX_TRIES = 100  # bad images in a row: then it is not the images
SKIPPED = "agvm_d2.skipped"  # key of a sample that stands in for a bad one
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


class _Images(Dataset):
    """(place in the stream, index) -> the mapped image."""

    def __init__(
        self,
        dicts: Sequence[dict],
        mapper: Callable,
        on_bad_image: str,
        grouping: bool,
        check: SampleCheck,
    ):
        self.dicts, self.mapper, self.on_bad_image = dicts, mapper, on_bad_image
        self.grouping, self.check = grouping, check
        self.seed, self.rank = 0, comm.get_rank()

    def __getitem__(self, key: tuple[int, int]) -> dict:
        place, index = key
        with _seeded(mixed_seed(self.seed, 0, self.rank, place)):
            try:
                sample = self._read(index)
            except BadImageError as error:
                if self.on_bad_image == "stop":
                    raise BadImageError(
                        f"The image or the mapper fails: {error}. Repair it, or set "
                        "DATALOADER.ON_BAD_IMAGE skip to train without such images."
                    ) from error
                return self._stand_in(index, [str(error)])
            return self._stand_in(index, []) if sample is None else sample

    def _read(self, index: int) -> dict | None:
        """None where the mapper leaves an image out, as Detectron2 allows."""
        record = self.dicts[index]
        name = record.get("file_name", f"number {index}")
        try:
            odd = self.check.record(record)  # before any C code sees it
            sample = self.mapper(record)
            if sample is not None:
                self.check.sample(sample, record)
        except Exception as error:
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
        # What AspectRatioGroupedDataset did so far: what it still holds comes first.
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
        dicts: list[dict],
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
        dicts = DatasetFromList(dicts, copy=False)
        self._images = _Images(dicts, mapper, on_bad_image, grouping, check or SampleCheck())

    def wide(self) -> list[bool]:
        """Of each image, whether it is wider than high."""
        return [_is_wide(record) for record in self._images.dicts]

    def seek(self, iteration: int, seed: int) -> None:
        """The next `iter` starts with this iteration's batch."""
        self.start, self.seed = iteration, seed

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
            batches = AspectRatioGroupedDataset(samples, self.batch_size)
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
        self._shift = 0  # batches of the data before this iteration, less iterations

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if self._loader:
            if self._images is not None:  # rounded down: better some images again than left out
                self._shift = self._images // self._batch_size() - start
            self._loader.seek(start + self._shift, self._seed)
        elif start:
            logger.warning(
                "This data loader cannot be brought back to where it was: the resumed run reads "
                "images in a new order."
            )

    def before_step(self) -> None:
        seed_everything(mixed_seed(self._seed, 1, comm.get_rank(), self.trainer.iter))

    def _batch_size(self) -> int:
        """Of all workers."""
        assert self._loader is not None
        return self._loader.batch_size * comm.get_world_size()

    def state_dict(self) -> dict:
        state = {"seed": self._seed, "workers": comm.get_world_size()}
        if self._loader and self.trainer is not None:  # not in one that has not trained
            state["images"] = (self.trainer.iter + 1 + self._shift) * self._batch_size()
        return state

    def load_state_dict(self, state: dict) -> None:
        self._seed = state["seed"]
        self._images = state.get("images")  # not in older checkpoints
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


def build_train_loader(
    cfg: CfgNode, *, mapper: Callable[[dict], dict] | None = None
) -> ResumableLoader | Iterable[list[dict]]:
    """Detectron2's training loader as the config describes it: a ResumableLoader, or Detectron2's
    own for a sampler that has no seed to start from again.

    Args:
        mapper: in place of `DatasetMapper(cfg, is_train=True)`.
    """
    data = cfg.DATALOADER
    raise_open_files()
    if data.SAMPLER_TRAIN not in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        return build_detection_train_loader(cfg, mapper=mapper)
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    dicts = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=data.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    # The sampler's function must not keep all of the dataset alive.
    if data.SAMPLER_TRAIN == "TrainingSampler":
        make_sampler = functools.partial(_training_sampler, len(dicts))
    else:
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, data.REPEAT_THRESHOLD
        )
        make_sampler = functools.partial(_repeating_sampler, factors)
    mapper = mapper or DatasetMapper(cfg, is_train=True)
    return ResumableLoader(
        dicts,
        mapper,
        cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        make_sampler,
        data.NUM_WORKERS,
        data.ASPECT_RATIO_GROUPING,
        shared_seed(cfg.SEED),
        data.ON_BAD_IMAGE,
        SampleCheck.of(cfg.DATASETS.TRAIN, mapper, data.CHECK_DATASETS),
    )


def _training_sampler(size: int, seed: int) -> Sampler:
    return TrainingSampler(size, seed=seed)


def _repeating_sampler(factors: torch.Tensor, seed: int) -> Sampler:
    return RepeatFactorTrainingSampler(factors, seed=seed)
