"""Runs a TeX engine on a text, where one is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ENGINES = {
    "tectonic": ["--keep-logs"],
    "pdflatex": ["-interaction=nonstopmode", "-halt-on-error"],
    "lualatex": ["-interaction=nonstopmode", "-halt-on-error"],
}


def engine() -> str | None:
    """The first that is there."""
    return next(filter(shutil.which, ENGINES), None)


def compiled(text: str, folder: Path) -> tuple[int, str]:
    """Number of pages and the log. Raises: AssertionError with the log's end when it does not compile."""
    name = engine()
    assert name is not None
    (folder / "t.tex").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [name, *ENGINES[name], "t.tex"], cwd=folder, capture_output=True, text=True, errors="replace", timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    log = (folder / "t.log").read_text(encoding="utf-8", errors="replace")
    pages = "".join(log.split()).rpartition("Outputwrittenon")[2].partition("(")[2]
    return int(pages.partition("page")[0]), log
