"""Medians, ratios and the report say what the runs say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks.picture import Axis, decades, picture
from benchmarks.report import BEGIN, END, inserted, markdown, progress, save, saved, show, write
from benchmarks.results import (
    BUDGET,
    COLD,
    COPY,
    MERGEKIT,
    SERVICE,
    WORKERS,
    Results,
    Run,
    Spread,
    figure,
    lines,
    ratios,
    scales,
    spread,
)

pytestmark = pytest.mark.fast

GB = 10**9


def run(what: str, number: int, wall_s: float, cpu_s: float = 1.0, **more: object) -> Run:
    found = Run(what, "1b", "files", "ties", number, wall_s, cpu_s, input_bytes=5 * GB, output_bytes=2 * GB)
    return replace(found, **more)  # type: ignore[arg-type]


RUNS = (
    run(COPY, 1, 2.0, 1.5),
    run(
        SERVICE,
        1,
        5.0,
        10.0,
        worker_peak_bytes=700 << 20,
        process_peak_bytes=900 << 20,
        priced_peak_bytes=800 << 20,
    ),
    run(MERGEKIT, 1, 150.0, 200.0, process_peak_bytes=4700 << 20),
    run(COPY, 2, 4.0, 1.5),
    run(
        SERVICE,
        2,
        6.0,
        20.0,
        worker_peak_bytes=600 << 20,
        process_peak_bytes=950 << 20,
        priced_peak_bytes=800 << 20,
    ),
    run(MERGEKIT, 2, 240.0, 210.0),
    run(COPY, 3, 2.5, 1.5),
    run(SERVICE, 3, 10.0, 15.0, worker_peak_bytes=1 << 20, priced_peak_bytes=800 << 20),
)
RESULTS = Results("1b", "2026-11-22T10:00+00:00", {"processor": "2 cores"}, {"mergemill": "0.1.0"}, runs=RUNS)


def test_ratios_are_taken_within_rounds_and_only_where_both_ran() -> None:
    services = [each for each in RUNS if each.what == SERVICE]
    others = [each for each in RUNS if each.what == MERGEKIT]
    assert ratios(others, services) == [30.0, 40.0]
    assert ratios(services, others[:1]) == [5 / 150]
    assert ratios(services, []) == []


def test_a_line_holds_medians_spreads_and_peaks() -> None:
    copy, service, mergekit = lines(RESULTS)
    assert (copy.what, service.what, mergekit.what) == (COPY, SERVICE, MERGEKIT)
    assert service.wall == Spread(6.0, 5.0, 10.0, 3)
    assert service.to_copy == Spread(2.5, 1.5, 4.0, 3)  # not 6.0 / 2.5
    assert service.mergekit_to == Spread(35.0, 30.0, 40.0, 2)
    assert service.cpu == Spread(3.0, 2.0, 4.0, 3)
    assert service.memory_bytes == 700 << 20  # the workers', not the biggest process's
    assert service.memory_of_priced == 700 / 800
    assert service.server_cpu is None
    assert (copy.to_copy, copy.mergekit_to, mergekit.mergekit_to, copy.memory_of_priced) == (None,) * 4
    assert mergekit.to_copy == Spread(67.5, 60.0, 75.0, 2)
    assert mergekit.memory_bytes == 4700 << 20


def test_stores_and_methods_never_mix() -> None:
    far = [
        run(SERVICE, 1, 50.0, store="s3", server_cpu_s=10.0),
        run(COPY, 1, 25.0, store="s3", server_cpu_s=5.0),
    ]
    other = [run(SERVICE, 1, 1.0, method="linear")]
    found = lines(replace(RESULTS, runs=(*RUNS, *far, *other)))
    assert [(line.store, line.method, line.what) for line in found] == [
        ("files", "ties", COPY),
        ("files", "ties", SERVICE),
        ("files", "ties", MERGEKIT),
        ("files", "linear", SERVICE),
        ("s3", "ties", COPY),
        ("s3", "ties", SERVICE),
    ]
    assert found[3].to_copy is None
    assert found[5].to_copy == Spread(2.0, 2.0, 2.0, 1)
    assert found[5].server_cpu == Spread(2.0, 2.0, 2.0, 1)


def test_spread_of_nothing_and_of_an_even_number() -> None:
    assert spread([]) is None
    assert spread([4.0, 1.0]) == Spread(2.5, 1.0, 4.0, 2)
    assert str(spread([4.0])) == "4.00"
    assert str(spread([4.0, 1.0, 400.0])) == "4.00 (1.00–400)"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.004, "0.00"), (1.234, "1.23"), (9.996, "10.0"), (12.34, "12.3"), (99.96, "100"), (170.4, "170")],
)
def test_figures_have_three_digits(value: float, shown: str) -> None:
    assert figure(value) == shown


def test_series_by_workers() -> None:
    one = run(WORKERS, 1, 10.0, workers=1, worker_peak_bytes=3, priced_peak_bytes=4)
    two = replace(one, wall_s=5.0, workers=2)
    found = scales([one, two, replace(two, wall_s=7.0, worker_peak_bytes=9)], lambda each: str(each.workers))
    assert [(scale.label, scale.wall.median, scale.worker_peak_bytes) for scale in found] == [
        ("1", 10.0, 3),
        ("2", 6.0, 9),
    ]


def _all() -> Results:
    budget = [
        run(BUDGET, 1, 5.0 * size, 3.0 * size, size=name, input_bytes=size * GB, worker_peak_bytes=800 << 20)
        for name, size in (("tiny", 1), ("1b", 7), ("7b", 40))
    ]
    more = [
        run(WORKERS, 1, 9.0, workers=1),
        run(COLD, 1, 12.0, priced_peak_bytes=1 << 30, worker_peak_bytes=1 << 29),
    ]
    return replace(
        RESULTS, runs=(*RUNS, *more, *(replace(each, priced_peak_bytes=1 << 30) for each in budget))
    )


def test_results_survive_being_kept() -> None:
    assert Results.from_json(_all().to_json()) == replace(_all(), notes=[], checks=[])


def test_the_report_holds_every_line() -> None:
    text = markdown([_all()])
    assert (
        "| ties | service, up | 6.00 (5.00–10.0) | 2.50 (1.50–4.00) | 35.0 (30.0–40.0) | 3.00 (2.00–4.00) |"
        in text
    )
    assert "| ties | 1 | 5.00 | 9.00 | 0.20 | 0 | 0 |" in text
    assert "## Cost against size" in text
    rows = [line for line in text.splitlines() if line.startswith("| ties | ") and "1,024" in line]
    assert [row.split(" | ")[1] for row in rows[-3:]] == ["tiny", "1b", "7b"]
    console = Console(width=200)
    with console.capture() as captured:
        show(_all(), console)
    assert "35.0 (30.0–40.0)" in captured.get()
    assert "5.00 s" in progress(RUNS[1])


def test_the_picture_is_an_svg_with_a_bar_for_every_line() -> None:
    root = ElementTree.fromstring(picture([_all()]))  # noqa: S314 - our own text
    name = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{name}text")]
    assert "1b on files: wall seconds" in texts
    assert len(list(root.iter(f"{name}rect"))) == 1 + 4 + 4  # background, legend, bars
    assert len(list(root.iter(f"{name}circle"))) == 2 * 3
    assert ElementTree.fromstring(picture([])).tag == f"{name}svg"  # noqa: S314 - as above


def test_axes() -> None:
    axis = decades([0.5, 30.0], 100, 400)
    assert (axis.low, axis.high) == (0.1, 100.0)
    assert axis.at(1.0) == pytest.approx(200)
    assert axis.ticks() == pytest.approx([0.1, 1, 10, 100])
    assert decades([10.0], 0, 1).high == 100.0
    assert Axis(0, 8, 10, 90, log=False).at(2) == 30


def test_what_people_wrote_around_the_report_stays() -> None:
    page = f"# Title\n\n{BEGIN}\nold\n{END}\n\nwhat bounds it\n"
    assert inserted(page, "new\n") == f"# Title\n\n{BEGIN}\n\nnew\n\n{END}\n\nwhat bounds it\n"
    assert inserted(inserted(page, "new"), "new") == inserted(page, "new")
    with pytest.raises(ValueError, match="marks"):
        inserted("# Title\n", "new")


def test_results_of_one_store_replace_those_of_the_last_time(tmp_path: Path) -> None:
    build = tmp_path
    small = replace(RESULTS, size="tiny", runs=())
    for results in (RESULTS, small, replace(RESULTS, made="later")):
        save(results, "files", build)
    save(replace(RESULTS, made="far"), "s3", build)
    assert [(results.size, results.made) for results in saved(build)] == [
        ("tiny", RESULTS.made),
        ("1b", "later"),
        ("1b", "far"),
    ]
    write(build, docs=False)
    assert (build / "benchmarks.md").read_text() == markdown(saved(build))
