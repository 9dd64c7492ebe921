"""What a sweep and its records look like: plain lines, a live table, a page."""

import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tests.tune import planted
from tests.tune.examples import DEVICE, record
from tests.tune.test_sweep import Instant, sweep
from tilewright.compiler.errors import UserError
from tilewright.schedules.records import text_of
from tilewright.tune_display import PlainSweep, _live, show_plan, show_sweep
from tilewright.tuner.log import Log
from tilewright.tuner.report import write_report
from tilewright.tuner.sweep import Budget, State
from tilewright.tuner.workloads import Step
from tilewright.tuning import Plan


@pytest.fixture
def state(tmp_path: Path) -> State:
    tasks = [planted.task((500, 400), ["crash", "wrong"]), planted.task((300, 200), rows=2, load_us=0.5)]
    return sweep(tasks, tmp_path, Instant(), Budget(trials=100))


def test_plain_lines_say_what_is_done(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), iter(range(0, 10_000, 4))
    show = PlainSweep(Console(file=stream, width=200), lambda: next(clock))
    sweep([planted.task((500, 400), ["crash"]), planted.task((300,), rows=2)], tmp_path, Instant(), observe=show)
    lines = stream.getvalue().splitlines()
    assert "planted 16 m=4: best 400 us, default 500; all tiles tried" in lines
    assert "planted 16 m=2: best 300 us, default 300; all tiles tried" in lines
    assert any(line.startswith("2 trials in ") and "whole model" in line for line in lines)
    assert any("failed: 1 crash" in line and "left" in line for line in lines)


def test_the_live_table_has_every_figure(state: State) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    console.print(_live(state))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "6 trials in " in text and "failed: 1 crash, 1 wrong" in text and "whole model -" in text
    [row] = [line for line in text.splitlines() if line.startswith("planted 16 m=4")]
    assert "500" in row and "400" in row and "4/4" in row and "1 crash, 1 wrong" in row and "all tiles tried" in row


def test_the_end_of_a_sweep_is_a_table(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    show_sweep(state)
    out = capsys.readouterr().out
    assert out.startswith("6 trials in ") and out.count("planted 16") == 2


def test_the_list_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    task = planted.task((500, 400))
    alone = planted.task((500,), rows=2)
    show_plan(Plan(task.target, (task,), (alone,)), {task.key: 450.0})
    captured = capsys.readouterr()
    lines = {line[: line.index("m=") + 3]: line for line in captured.out.splitlines() if "m=" in line}
    assert "450" in lines["planted 16 m=4"] and "one tile alone" in lines["planted 16 m=2"]
    assert "tilewright doctor --measure" in captured.err
    assert Step(1, 1, True, 1.0).share == 1.0


class Tags(HTMLParser):
    """Counts what a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


def test_the_page_has_a_row_and_a_curve_for_each_task(tmp_path: Path) -> None:
    sizes = {"bytes": 1000, "operations": 64000}
    Log(tmp_path, DEVICE).add(
        [
            record(1, 9.0, trial=1, **sizes),
            record(2, None, trial=2),
            record(4, 6.0, trial=3, **sizes),
            record(1, 5.0, n=9, trial=1),
        ]
    )
    page = tmp_path / "page.html"
    assert write_report(tmp_path, page) == []
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.found.count("tr") == 1 + 2  # a head, two tasks
    assert tags.found.count("circle") == 2  # the default and the best of the task whose floor is known
    assert "<td>33.3%</td>" in text and "failed: 1 crash" in text and "width 4" in text
    assert text_of(planted.PlantedTile(1)) not in text


def test_no_records_no_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tuning records; run tilewright tune MODEL first"):
        write_report(tmp_path, tmp_path / "page.html")
    Log(tmp_path, DEVICE).add([record()])
    with pytest.raises(UserError, match=r"can't be written \(.*\); name another place with -o"):
        write_report(tmp_path, tmp_path / "none" / "page.html")
