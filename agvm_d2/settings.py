"""AGVM's options. Each stands here once: its name, default, meaning and check.

The keys of a yacs config, the `agvm` dict of a LazyConfig and the arguments of `AGVMHook` are made
from these fields; AGVM.INTERVAL in a YAML file is `interval` here.
"""

from __future__ import annotations
import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

from .rules import RULES
from .validate import holds, is_int, is_number, one_of, require


def _are_pairs(value: Any) -> bool:
    pairs = isinstance(value, (tuple, list)) and all(isinstance(p, (tuple, list)) for p in value)
    return pairs and all([type(x) for x in pair] == [str, str] for pair in value)


# Iterations between measurements and the average's momentum, where they are not given: the paper's;
# with the gain, which decides from the start on how long training lasts, an average over some 50
# iterations instead of 330.
AVERAGING, AVERAGING_OF_GAIN = (10, 0.97), (5, 0.9)

# (condition, what it asks for), or the names to choose from.
Allowed = tuple[Callable[[Any], Any], str] | Collection[str]
POSITIVE: Allowed = (lambda v: is_int(v) and v >= 1, "be at least 1")
INTERVAL: Allowed = (lambda v: is_int(v) and (v >= 1 or v == -1), "be at least 1, or -1")
ITERATION: Allowed = (lambda v: is_int(v) and v >= -1, "be -1 or an iteration")
SHARE: Allowed = (lambda v: is_number(v) and (0 <= v < 1 or v == -1), "be in [0, 1), or -1")
NAME: Allowed = (lambda v: isinstance(v, str), "be a module's name")
PAIRS: Allowed = (_are_pairs, "be pairs (module name, regex), such as (('all', '.'),)")
BOUNDS: Allowed = (
    lambda v: len(v) == 2 and is_number(*v) and 0 < v[0] <= 1 <= v[1],
    "be two numbers (low, high) with 0 < low <= 1 <= high",
)


def _option(default: Any, allowed: Allowed) -> Any:
    return dataclasses.field(default=default, metadata={"allowed": allowed})


def yacs_key(name: str) -> str:
    """What a yacs config, and so a message, calls the option."""
    return f"AGVM.{name.upper()}"


def averaging(rule: str, interval: int = -1, momentum: float = -1.0) -> tuple[int, float]:
    """Interval and momentum, each the rule's own where it is -1."""
    own = AVERAGING_OF_GAIN if rule == "gain" else AVERAGING
    return own[0] if interval == -1 else interval, own[1] if momentum == -1 else momentum


@dataclasses.dataclass(frozen=True)
class Settings:
    """How AGVM measures and what it does with it.

    >>> Settings(interval=0).check()
    Traceback (most recent call last):
    ValueError: AGVM.INTERVAL: found 0, but it must be at least 1, or -1.
    """

    mode: str = _option("modulate", ("modulate", "monitor"))  # "monitor": measure and log only
    estimator: str = _option("pairwise", ("pairwise", "split"))  # "split": the paper's, two halves
    rule: str = _option("variance", RULES)  # "gain": each module's AdaScale gain
    schedule: str = _option("iterations", ("iterations", "gain"))  # "gain": LR and end by progress
    base_batch_size: int = _option(16, POSITIVE)  # for "gain": the batch that the LR is for
    interval: int = _option(-1, INTERVAL)  # iterations between measurements; -1: 10, "gain" 5
    start_iter: int = _option(-1, ITERATION)  # first measured; -1: 100 iterations after warm-up
    stop_iter: int = _option(-1, ITERATION)  # from here on factors are 1; -1: never
    momentum: float = _option(-1.0, SHARE)  # of the moving average; -1: 0.97, "gain" 0.9
    ratio_range: tuple[float, float] = _option((0.5, 10.0), BOUNDS)  # of the variance ratio
    anchor: str = _option("backbone", NAME)  # the module that the others are brought to
    modules: tuple[tuple[str, str], ...] = _option((), PAIRS)  # first match wins; (): known ones

    def __post_init__(self) -> None:
        interval, momentum = averaging(self.rule, self.interval, self.momentum)
        object.__setattr__(self, "interval", interval)  # it is frozen
        object.__setattr__(self, "momentum", momentum)

    def check(self, key: Callable[[str], str] = yacs_key) -> Settings:
        """These settings, if they are good.

        Args:
            key: field name -> what a message calls it.

        Raises:
            ValueError: names the key, what was found and what it must be.
        """
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata["allowed"]
            if callable(next(iter(allowed))):
                require(holds(allowed[0], value), key(field.name), value, allowed[1])
            else:
                one_of(key(field.name), value, allowed)
        for name, regex in self.modules:
            try:
                re.compile(regex)
            except re.error as error:
                where = f"{key('modules')}: '{regex}' of module '{name}'"
                raise ValueError(f"{where} is not a regex: {error}.") from None
        if self.schedule == "gain" and self.rule == "variance":
            raise ValueError(
                f"{key('schedule')}: found 'gain', but {key('rule')} is '{self.rule}': only a "
                f"learning rate that grows with the gain makes up for fewer iterations. Set "
                f"{key('rule')} to 'gain', or {key('schedule')} to 'iterations'."
            )
        return self

    def check_gain(
        self,
        batch_size: int | None,
        max_iter: int | None = None,
        key: Callable[[str], str] = yacs_key,
    ) -> None:
        """See that training by the gain can be shorter than that of the base batch.

        Args:
            batch_size: images of one iteration; none: not known.
            max_iter: iterations of the base batch.
            key: field name -> what a message calls it.

        Raises:
            ValueError: names the key, what was found and what it must be.
        """
        if not self.by_gain:  # without the gain's rates the base batch may be any
            return
        if batch_size is not None and batch_size < self.base_batch_size:
            raise ValueError(
                f"{key('schedule')} gain: a batch of {batch_size} images is below "
                f"{key('base_batch_size')}, {self.base_batch_size}, which the learning rate and "
                "the number of iterations are for. Train with as many images or more, or set "
                f"{key('base_batch_size')} to the batch that the config works at."
            )
        if max_iter is not None and self.start_iter >= max_iter:
            raise ValueError(
                f"{key('schedule')} gain: {key('start_iter')} is {self.start_iter}, but training "
                f"has {max_iter} iterations: nothing would be measured, and training not be "
                f"shorter. Set {key('start_iter')} to -1 (from the first iteration on)."
            )

    @property
    def by_gain(self) -> bool:
        """Does progress decide on the LR and the end of training?"""
        return self.schedule == "gain" and self.mode == "modulate"
