"""Every config key of this package, and how a config file is read."""

from __future__ import annotations
import dataclasses
import re
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .. import model_zoo
from ..settings import Settings
from ..validate import did_you_mean, message, nested_keys
from .yaml_files import check_yaml


def add_agvm_config(cfg: CN) -> None:
    """Add this package's keys to a Detectron2 config; once, since a project may have set them."""
    if "AGVM" in cfg:
        return
    cfg.AGVM = CN({"ENABLED": True})
    for field in dataclasses.fields(Settings):
        cfg.AGVM[field.name.upper()] = field.default

    # "SGD" or "ADAMW"; "LARS", "LAMB" or "MUON", from the package pytorch-optimizer.
    cfg.SOLVER.OPTIMIZER = cfg.SOLVER.get("OPTIMIZER", "SGD")  # a project may have the key
    # Of ADAMW, LAMB, and AdamW in MUON; an EPS of 0 is their own, 1e-6 for LAMB and else 1e-8.
    cfg.SOLVER.BETAS = cfg.SOLVER.get("BETAS", (0.9, 0.999))
    cfg.SOLVER.EPS = cfg.SOLVER.get("EPS", 0.0)
    # Images of one forward and backward pass on one worker, gradients averaged over the worker's
    # share of IMS_PER_BATCH; 0: all at once.
    cfg.SOLVER.MICRO_BATCH_SIZE = 0
    # Iterations [first, last) in which CLIP_GRADIENTS works; (): always. CLIP_TYPE may also be
    # "full_model", the norm over all parameters together, or "relative", that to CLIP_VALUE times
    # its average.
    cfg.SOLVER.CLIP_GRADIENTS.ITER_RANGE = ()
    # A NaN or inf: "stop" when the loss has one, as Detectron2, or "skip" each step whose gradient
    # has one, in all workers alike.
    cfg.SOLVER.ON_NONFINITE = "stop"
    # An image or annotation that cannot be read: "stop", or "skip" to the next; both name the file.
    cfg.DATALOADER.ON_BAD_IMAGE = "stop"
    # Look at the datasets before training, and compare the config with them.
    cfg.DATALOADER.CHECK_DATASETS = True
    # SOLVER.WARMUP_METHOD may also be "exp": the learning rate grows by a constant factor.


TYPE_MISMATCH = re.compile(
    r"Type mismatch \(<class '(.*?)'> vs\. <class '(.*?)'>\) .* vs\. (.*)\) for config key: (\S+)",
    re.DOTALL,
)


UNKNOWN = re.compile(r"Non-existent (?:config )?key: ([\w.]+)")
QUOTES = """ In a shell: AGVM.MODULES "(('all', '.'),)"."""  # or it takes quotes and brackets off


def naming_the_key(error: Exception, cfg: CN) -> ValueError:
    """yacs' complaint about a key of a config, in words that name the key.

    Args:
        cfg: with the keys that there are.
    """
    unknown = UNKNOWN.search(str(error))
    if unknown:
        found = message(error).rstrip(".")
        return ValueError(f"config: {found}{did_you_mean(unknown.group(1), nested_keys(cfg))}")
    mismatch = TYPE_MISMATCH.search(str(error))
    if not mismatch:
        return ValueError(f"config: {message(error)}")
    wanted, found, value, key = mismatch.groups()
    wanted = "a group of keys" if wanted.endswith("CfgNode") else f"of type {wanted}"
    hint = QUOTES if key == "AGVM.MODULES" else ""
    return ValueError(f"{key}: found {value} of type {found}, but it must be {wanted}.{hint}")


def read_config(path: str, opts: list, allow_unsafe: bool = False, cfg: CN | None = None) -> CN:
    """Detectron2's config with this package's keys, the file and then `opts`, KEY VALUE pairs.

    Args:
        path: a file, or a name of the model zoo.
        allow_unsafe: let the file's !!python tags run code, as Detectron2 does.
        cfg: a config with a project's keys instead of Detectron2's; it is changed.

    Raises:
        ValueError, OSError: names the file or key.
    """
    cfg = get_cfg() if cfg is None else cfg
    add_agvm_config(cfg)
    path = model_zoo.find(path)
    check_yaml(path, allow_unsafe)
    flags = [key for key in opts[::2] if key.startswith("--")]
    if flags:  # argparse takes all that follows the first key for keys and values
        raise ValueError(f"{flags[0]}: flags go before the KEY VALUE pairs.")
    try:
        cfg.merge_from_file(path)
        cfg.merge_from_list(opts)
    # An unknown key, a wrong type, a tag that does not fit its value, in the words of others.
    except (AssertionError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise naming_the_key(error, cfg) from None
    except KeyError as error:  # of the file
        raise ValueError(
            f"--config-file: '{path}': {naming_the_key(error, cfg)} --import MODULE:FUNCTION adds "
            "a project's own keys."
        ) from None
    return cfg
