"""The demo's table and verdict say what the numbers say, losers included."""

from __future__ import annotations

import pytest
from rich.console import Console

from demo.report import Row, table, verdict

pytestmark = pytest.mark.fast

SINGLES = [Row("base", "", (0.5, 0.7)), Row("tuned: a", "", (0.9, 0.5))]
GOOD, EVEN, BAD = Row("good", "x 1", (0.8, 0.8)), Row("even", "", (0.7, 0.7)), Row("bad", "", (0.1, 0.2))


def test_a_tie_is_not_a_win_and_a_loser_is_named() -> None:
    assert verdict(SINGLES, [GOOD, EVEN, BAD]) == (
        "On the mean over the tasks good 80.0 beats the base and every fine-tune (best: tuned: a 70.0); "
        "even 70.0, bad 15.0 do not."
    )


def test_all_win_and_none_wins() -> None:
    assert verdict(SINGLES, [GOOD, GOOD]).endswith("beat the base and every fine-tune (best: tuned: a 70.0).")
    assert verdict(SINGLES, [BAD]).startswith("On the mean over the tasks no merge beats the base")


def test_the_table_holds_every_number() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table(("a", "b"), SINGLES, [GOOD, BAD]))
    lines = captured.get().splitlines()
    (bad,) = [line for line in lines if "bad" in line]
    assert [cell.strip() for cell in bad.split("│")[1:-1]] == ["bad", "", "10.0", "20.0", "15.0"]
    assert len([line for line in lines if "│" in line]) == 4
