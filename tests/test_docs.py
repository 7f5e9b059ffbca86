"""README and docs/: what the pages name is there, and each row of docs/paper.md has an answer."""

import glob
import os
import re
import pytest
from helpers import CONFIGS, ROOT

README = os.path.join(ROOT, "README.md")
PAGES = [README, *sorted(glob.glob(os.path.join(ROOT, "docs", "*.md")))]
ANSWERS = ("reproduced", "tried here", "shipped, not run", "not there")


def text(path: str) -> str:
    with open(path) as f:
        return f.read()


def anchors(path: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", text(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("path", PAGES, ids=os.path.basename)
def test_links_lead_somewhere(path):
    prose = re.sub(r"^```.*?^```", "", text(path), flags=re.M | re.S)
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", prose):
        name, _, anchor = link.partition("#")
        target = os.path.join(os.path.dirname(path), name) if name else path
        assert os.path.exists(target), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len(text(README).splitlines()) <= 150


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "mkdocs.yml"])
def test_every_page_is_listed(name):
    listed = re.findall(r"(?:\]\(|- )(?:docs/)?([\w-]+\.md)", text(os.path.join(ROOT, name)))
    pages = {os.path.basename(page) for page in PAGES[1:]}
    assert pages - {"index.md"} == set(listed) & pages - {"index.md"}


def rows() -> list[list[str]]:
    page = text(os.path.join(ROOT, "docs", "paper.md"))
    lines = [line.strip("|").split(" | ") for line in re.findall(r"^\| (.*) \|$", page, flags=re.M)]
    return [row for row in lines if row[1] != "answer"]


def test_every_item_of_the_paper_has_an_answer_and_a_reason():
    assert len(rows()) > 50
    for row in rows():
        item, answer, why = row
        assert item and len(why) > 10 and answer.strip("*") in ANSWERS, row
        if answer == "**reproduced**":
            assert "`" in why or "](" in why, row


def test_the_configs_it_names_are_there():
    named = [
        name for row in rows() for name in re.findall(r"`([\w-]*/?[\w*]*bs\*[\w*.]*)`", row[2])
    ]
    assert len(named) > 8
    for name in named:
        folder = "" if "/" in name else "*/"
        assert len(glob.glob(os.path.join(CONFIGS, folder + name))) >= 2, name
