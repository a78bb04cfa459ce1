"""What a search shows: the same trials on a terminal and in a log, and the plot."""

from __future__ import annotations

import sys

from pruneval.harness.search.view import View


def search(path):
    with View("vtw on a model") as show:
        show.note("accuracy without pruning: 0.900")
        show.expect(3)
        for value in (0.1, 0.4, 0.3):
            show.trial(value, f"value {value}")
    show.plot(path)
    return show.summary()


def test_a_log_has_a_line_per_trial(tmp_path, capsys):
    assert search(tmp_path / "plot.png") == "3 trials, best objective 0.4000"
    assert capsys.readouterr().err.splitlines() == [
        "accuracy without pruning: 0.900",
        "vtw on a model: 3 trials",
        "  trial 1: 0.1000 (best 0.1000) value 0.1",
        "  trial 2: 0.4000 (best 0.4000) value 0.4",
        "  trial 3: 0.3000 (best 0.4000) value 0.3",
    ]
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_terminal_has_a_bar_with_the_last_trial(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    search(tmp_path / "plot.png")
    err = capsys.readouterr().err
    assert "accuracy without pruning: 0.900" in err
    assert "vtw on a model: trial 3: 0.3000 (best 0.4000) value 0.3" in err and "3/3" in err
