"""The commands of README and docs/ that a machine without COCO and GPUs can run, page by page in
one folder, as a reader types them but for a shorter training."""

import os
import re
import pytest
from helpers import DIGITS, ROOT, VITDET, finish, start
from test_commands import PYTHON

PROGRAMS = {"train_net.py", "train", "plot", "plan", "visualize", "data.check"}
MEANT = {  # what stands for a reader's own
    "...": DIGITS,
    "CONFIG": DIGITS,
    "STOCK.py": VITDET,
    "CONFIG.py": VITDET,
    "OUTPUT_DIR": "output/demo",
    "NAME...": "digits_val",
}
YAML = (
    "SOLVER.IMS_PER_BATCH 8 SOLVER.MICRO_BATCH_SIZE 2 SOLVER.MAX_ITER 30 SOLVER.WARMUP_ITERS 2 "
    "SOLVER.STEPS (20,) AGVM.START_ITER 2 AGVM.INTERVAL 1 AGVM.BASE_BATCH_SIZE 4 "
    "DATALOADER.NUM_WORKERS 0 TEST.EXPECTED_RESULTS [] OUTPUT_DIR output/demo"
).split()
LAZY = (
    "dataloader.train.total_batch_size=8 train.micro_batch_size=2 train.max_iter=3 "
    "dataloader.train.num_workers=0 dataloader.test.num_workers=0 agvm.start_iter=1 "
    "agvm.interval=1 train.expected_results=[] train.device=cpu train.output_dir=output/lazy"
).split()


def as_typed() -> list[tuple[str, list[str]]]:
    """(page, words after `python`), each once."""
    found = {}
    for page, name, args in sorted(PYTHON, key=lambda command: command[0] != "README.md"):
        name = name.removeprefix("agvm_d2.")
        trains = name in ("train_net.py", "train")
        other = any(re.match("COCO-|configs/COCO-|--import", word) for word in args)
        if name not in PROGRAMS or not args or other or (trains and "8" in args):
            continue
        first = args[0] == "OUTPUT_DIR"  # elsewhere it is the key
        args = [MEANT[w] if w in MEANT and (w != "OUTPUT_DIR" or first) else w for w in args]
        if trains and "--eval-only" not in args:
            lazily = args[args.index("--config-file") + 1].endswith(".py")
            args += LAZY if lazily else YAML
            if not lazily and any("_gain" in word for word in args):  # in a folder of its own
                args[-1] = "output/gain"
        command = [name] if name == "train_net.py" else ["-m", f"agvm_d2.{name}"]
        found.setdefault((*command, *args), page)
    return [(page, [*words]) for words, page in found.items()]


COMMANDS = as_typed()


def test_each_program_is_there():
    assert {
        w[0] if w[0] != "-m" else w[1].removeprefix("agvm_d2.") for _, w in COMMANDS
    } == PROGRAMS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "train_net.py"):
        os.symlink(os.path.join(ROOT, name), folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("words", [w for _, w in COMMANDS], ids=[page for page, _ in COMMANDS])
def test_the_command_runs(words, folder, digits):
    if any(word.endswith(".py") and "vitdet" in word for word in words):
        pytest.importorskip("timm")
    finish(start(*words, cwd=folder))
