"""The commands of README and docs/: each is one that its program takes, and its config is there."""

import argparse
import glob
import importlib
import os
import re
import shlex
import sys
import pytest
from helpers import ROOT

from agvm_d2 import model_zoo

PAGES = [
    *sorted(glob.glob(os.path.join(ROOT, "docs", "*.md"))),
    *(os.path.join(ROOT, name) for name in ("README.md", "CONTRIBUTING.md")),
]
RUN = ("agvm_d2.recipe", "agvm_d2.modules")  # these take a second, so they are run whole


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each line of a code block, and of each `python ...` in the text, that starts
    one of our programs."""
    found = []
    start = r"(?:^|\s)((?:python|make|agvm-[\w-]+|train_net\.py|-m agvm_d2)\s.*)"
    for page in PAGES:
        with open(page) as f:
            text = f.read()
        fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.M | re.S)
        blocks = "\n".join(code for _, language, code in fence.findall(text) if not language)
        spans = re.findall(r"`(python (?!-m`)[^`]*)`", fence.sub("", text))
        for line in [*blocks.replace("\\\n", " ").splitlines(), *spans]:
            match = re.search(start, line.replace("\n", " "))
            if match:
                words = shlex.split(match[1].partition(" ||")[0], comments=True)
                found.append((os.path.basename(page), words))
    return found


def program(words: list[str]) -> tuple[str, list[str]]:
    """The module or file that Python runs, and its arguments."""
    words = words[1:] if words[0] == "python" else words
    if words[0] == "-m":
        return words[1], words[2:]
    if words[0].startswith("agvm-"):
        with open(os.path.join(ROOT, "setup.cfg")) as f:
            entry = re.search(rf"^ *{words[0]} *= *([\w.]+):", f.read(), flags=re.M)
        return entry[1], words[1:]
    return words[0], words[1:]


COMMANDS = commands()
PYTHON = [(page, *program(words)) for page, words in COMMANDS if words[0] != "make"]
OURS = [
    (page, name, args)
    for page, name, args in PYTHON
    if name.startswith(("agvm_d2", "benchmarks", "train_net.py"))
    and name != "benchmarks/tested.py"  # whose arguments are pytest's
]


class Parsed(Exception):
    pass


def test_there_are_many():
    assert len(OURS) > 30
    assert {"train_net.py", "agvm_d2.plan", "agvm_d2.recipe"} < {name for _, name, _ in OURS}


@pytest.mark.parametrize("words", [w for _, w in COMMANDS if w[0] == "make"], ids=" ".join)
def test_make_has_the_target(words):
    with open(os.path.join(ROOT, "Makefile")) as f:
        targets = re.findall(r"^([\w-]+):", f.read(), flags=re.M)
    assert words[1] in targets


@pytest.mark.parametrize(
    "name, args",
    [pytest.param(name, args, id=" ".join([page, name, *args])) for page, name, args in OURS],
)
def test_a_command_is_understood(name, args, monkeypatch, capsys):
    config = args[args.index("--config-file") + 1] if "--config-file" in args else "..."
    ours = "--import" not in args and not re.fullmatch(r"[A-Z]+(\.py)?|\.\.\.", config)
    if ours:
        assert os.path.exists(os.path.join(ROOT, model_zoo.find(config)))
    if ours and name in RUN:
        importlib.import_module(name).main(args)
        assert capsys.readouterr().out
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *given, **kwargs):
        parse(self, *given, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [name, *args])
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.__main__")
    if name == "agvm_d2.model_zoo":  # takes no arguments
        module.main()
        assert "COCO-Detection/" in capsys.readouterr().out
        return
    with pytest.raises((Parsed, SystemExit)) as stopped:
        (module.invoke_main if name == "train_net.py" else module.main)()
    # The text may name a program, or a flag of it, and leave the rest out.
    left_out = "the following arguments are required" in capsys.readouterr().err
    assert stopped.type is Parsed or left_out
