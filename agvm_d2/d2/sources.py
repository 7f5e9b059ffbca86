"""Where initial weights come from, checked before any worker starts."""

from __future__ import annotations
import functools
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlparse
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils import comm

TIMEOUT = 10.0  # s
DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"


def check_weights(
    keys: Sequence[str], weights: str, output_dir: str, eval_only: bool, resumes: bool
) -> None:
    """Are the weights there that a run starts from?

    Args:
        keys: what messages call `weights` and `output_dir`, first of all.
        resumes: there is a checkpoint to go on from, and `weights` is not read.

    Raises:
        ValueError: none to evaluate, or a URL that cannot be fetched.
        FileNotFoundError: no such file.
    """
    if resumes:
        return
    if not weights:
        if eval_only:
            raise ValueError(
                f"--eval-only: {keys[0]} is empty, so random weights would be evaluated. Give it "
                f"a file, or add --resume to evaluate the last checkpoint in {keys[1]}, "
                f"'{output_dir}'."
            )
        return
    url = as_url(weights, keys[0])
    if url:
        problem = "" if comm.get_world_size() > 1 else why_not_fetched(url)  # once is enough
        if problem:
            raise ValueError(
                f"{keys[0]}: '{weights}' cannot be fetched from here ({problem}). Where there is a "
                f"network, download {url}; then give its path in {keys[0]}, or put it at "
                f"{cached(url)}, where Detectron2 looks first ($FVCORE_CACHE names that folder)."
            )
    elif "://" not in weights and not os.path.exists(weights.partition("?")[0]):
        raise FileNotFoundError(f"{keys[0]}: '{weights}' is not there")


def as_url(weights: str, key: str = "MODEL.WEIGHTS") -> str:
    """The http(s) URL behind a path, the value of `key`, or ""."""
    weights = weights.partition("?")[0]  # Detectron2's ?matching_heuristics=True
    if weights.startswith("detectron2://"):
        return DETECTRON2 + weights[len("detectron2://") :]
    if weights.startswith("catalog://"):
        try:
            return ModelCatalog.get(weights[len("catalog://") :])
        except (KeyError, RuntimeError):
            raise ValueError(f"{key}: Detectron2 has no '{weights}'") from None
    return weights if weights.startswith(("http://", "https://")) else ""


def cached(url: str) -> str:
    """Where Detectron2 keeps what it has downloaded."""
    folder = os.path.expanduser(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache"))
    return os.path.join(folder, urlparse(url).path.lstrip("/"))


@functools.lru_cache
def why_not_fetched(url: str) -> str:
    """ "" where the file is in the cache, or its server answers within seconds."""
    if os.path.isfile(cached(url)):
        return ""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        # Some servers refuse to be asked for the head alone.
        return "" if error.code in (403, 405, 501) else f"HTTP {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""
