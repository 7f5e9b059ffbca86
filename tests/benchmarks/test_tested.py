"""The table of what was tested."""

import pytest

from benchmarks import tested

PAGE = f"# Install\n\n{tested.HEADER}---|---|---|---|---|---|---|---|\n{{}}\nAfter.\n"
ROW = ["3.11.7", "2.14.1", "1.26.4", "detectron2 0.6", "2 CPU cores", "all", "5 passed", "today"]


def line(row):
    return f"| {' | '.join(row)} |\n"


def test_a_row_is_added_once_and_then_replaced():
    page = tested.updated(PAGE.format(""), ROW)
    assert page == PAGE.format(line(ROW))
    later = [*ROW[:6], "6 passed", "tomorrow"]
    assert tested.updated(page, later) == PAGE.format(line(later))


def test_rows_of_other_versions_stay():
    other = ["3.12.3", *ROW[1:]]
    page = tested.updated(tested.updated(PAGE.format(""), ROW), other)
    assert page == PAGE.format(line(ROW) + line(other))
    assert tested.updated(page, ROW) == PAGE.format(line(other) + line(ROW))


def test_a_bar_in_a_cell_is_escaped():
    page = tested.updated(PAGE.format(""), [*ROW[:5], "a|b", *ROW[6:]])
    assert "| a\\|b |" in page
    assert tested.updated(page, [*ROW[:5], "a|b", *ROW[6:]]) == page


def test_the_page_has_the_table():
    page = tested.PAGE.read_text()
    assert tested.updated(page, ROW).count("\n") == page.count("\n") + 1
    with pytest.raises(ValueError, match="one table with the header"):
        tested.updated("", ROW)


def test_versions_and_machine_are_told():
    name, version = tested.detectron2_version().split(" ")[:2]
    assert "detectron2" in name and version[0].isdecimal()
    assert tested.machine()
