"""Bad values of AGVM's options: what `Settings.check`, a yacs config, a LazyConfig and `AGVMHook`
refuse alike, each naming the option as it is spelled there."""

from __future__ import annotations
import json
import math

# Field of Settings -> its bad values, and what the message says after the key. A wrong type may
# also be found by yacs, in whose words strings have no quotes; a LazyConfig's tuples are lists.
BAD = {
    "mode": {"on": "found 'on', .* modulate, monitor", "": "found ''", 1: "found 1", (): "found"},
    "estimator": {
        "pair": "found 'pair', .* pairwise, split",
        "none": "found 'none'",
        2: "found 2",
        (): "found",
    },
    "rule": {
        "agvm": "found 'agvm', .* variance, gain",
        "adascale": "found 'adascale'",
        1: "found 1",
        (): "found",
    },
    "schedule": {
        "epochs": "found 'epochs', .* iterations, gain",
        "progress": "found 'progress'",
        "gain": "found 'gain', but .* is 'variance'",
        1: "found 1",
        (): "found",
    },
    "base_batch_size": {
        0: "found 0, .*at least 1",
        -16: "found -16",
        "x": "found '?x",
        2.5: "found 2.5",
    },
    "interval": {
        0: "found 0, .*at least 1",
        -5: "found -5",
        "ten": "found '?ten",
        2.5: "found 2.5",
        (1,): "found .1,?.",
        True: "found True",
    },
    "start_iter": {
        -2: "found -2, .*-1 or an iteration",
        "now": "found '?now",
        1.5: "found 1.5",
        (): "found",
    },
    "stop_iter": {-3: "found -3, .*-1 or an iteration", "end": "found '?end", 0.5: "found 0.5"},
    "momentum": {
        1.0: r"found 1.0, .*in \[0, 1\)",
        2.0: "found 2.0",
        -0.1: "found -0.1",
        "x": "found '?x",
        math.nan: "found '?nan",
        (): "found",
    },
    "ratio_range": {
        (2.0, 10.0): "found .2.0, 10.0., .*0 < low <= 1 <= high",
        (0.5, 0.9): "found .0.5, 0.9.",
        (0, 1): "found .0, 1.",
        (0.5,): "found .0.5,?.",
        ("a", "b"): "found .'a', 'b'.",
        (): "found",
        5: "found 5",
    },
    "anchor": {3: "found 3", (): "found"},
    "modules": {
        ("backbone",): "found .'backbone',?., .*pairs",
        (("a", "b", "c"),): "found ..'a', 'b', 'c'.,?., .*pairs",
        (1, 2): "found .1, 2., .*pairs",
        "x": "found '?x",
        (("rpn", "("),): r"'\(' of module 'rpn' is not a regex",
    },
}
CASES = [(key, value, said) for key, values in BAD.items() for value, said in values.items()]


def in_yacs(key: str) -> str:
    return f"AGVM.{key.upper()}"


def override(key: str, value) -> str:
    """An override of a LazyConfig."""
    return f"agvm.{key}={json.dumps(value)}"
