"""What a run shows: bars at a terminal, lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from pruneval.harness.progress import Bars, Progress


def bars() -> tuple[Bars, io.StringIO]:
    made, stream = Bars(), io.StringIO()
    made.console = Console(file=stream, force_terminal=True, width=100)
    return made, stream


def test_cells_that_run_at_the_same_time_stand_under_each_other():
    made, stream = bars()
    with made.sweep("sweep") as tell:
        tell(1, 7)
        first, second = made.cell("[1/7] first [bold]"), made.cell("[2/7] second")
        first.__enter__()(3, 10)
        second.__enter__()(4, 20)
        made._bars.refresh()
        together = stream.getvalue()
        made.say("a line [1/7]")
        first.__exit__(None, None, None)
        stream.truncate(0)
        made._bars.refresh()
        left = stream.getvalue()
        second.__exit__(None, None, None)
    assert all(text in together for text in ("sweep", "1/7", "first [bold]", "3/10", "second", "4/20"))
    assert "first" not in left and "4/20" in left
    with made.cell("afterwards") as tell:
        tell(1, 1)
    assert "afterwards" in stream.getvalue()


def test_a_failure_inside_leaves_no_bar_behind():
    made, _ = bars()
    try:
        with made.sweep("sweep"), made.cell("cell"):
            raise ValueError
    except ValueError:
        pass
    assert not made._bars.live.is_started


def test_lines_come_at_the_end_and_every_few_seconds():
    stream = io.StringIO()
    for every, expected in ((1000.0, ["3 of 3"]), (0.0, ["1 of 3", "2 of 3", "3 of 3"])):
        stream.truncate(0)
        stream.seek(0)
        show = Progress(stream, every)
        with show.sweep("sweep") as total, show.cell("title") as tell:
            total(1, 2)
            for done in (1, 2, 3):
                tell(done, 3)
        lines = stream.getvalue().splitlines()
        assert [line.split(": ")[1].split(" answers")[0] for line in lines] == expected
