"""The prompts of every benchmark are frozen, as lmms-eval makes them and as each family's chat template wraps them.

After a wanted change: `python tests/test_prompts.py` writes the snapshot anew.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from pruneval import tasks
from pruneval.harness.evaluate import build_tasks
from pruneval.harness.internvl2_processor import chat_template
from pruneval.harness.judge import judging
from pruneval.harness.lmms_task import quiet

SNAPSHOT = Path(__file__).parent / "snapshots" / "prompts.json"
POCKET = Path(tasks.__file__).parent / "pocket" / "models" / "pocket-llava" / "chat_template.jinja"
FAMILIES = {
    "llava": POCKET.read_text(encoding="utf-8"),
    "internvl2-8b": chat_template("internlm2-chat"),
    "internvl2-4b": chat_template("phi3-chat"),
}
NAMES = [name for name, row in tasks.benchmarks().items() if row.edition == "pocket"]


@cache
def frozen() -> dict[str, Any]:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def prompts(name: str) -> dict[str, list[str]]:
    """The first prompt of each of a benchmark's tasks: plain, and in every family's template."""
    row = tasks.benchmark(name)
    with quiet(), judging(row, None):
        asked = [task.doc_to_messages(task.eval_docs[0]) for task in build_tasks(row)]
    bare = [
        [
            {
                "role": turn["role"],
                "content": [{k: v for k, v in part.items() if k in ("type", "text")} for part in turn["content"]],
            }
            for turn in messages
        ]
        for messages in asked
    ]
    found = {"messages": ["".join(map(_shown, messages[0]["content"])) for messages in bare]}
    for family, template in FAMILIES.items():
        found[family] = render_jinja_template(bare, chat_template=template, add_generation_prompt=True)[0]
    return found


def _shown(part: dict[str, str]) -> str:
    return part["text"] if part["type"] == "text" else f"<{part['type']}>"


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_frozen(name: str):
    assert prompts(name) == frozen()[name]


def test_every_benchmark_is_frozen_and_no_other():
    assert list(frozen()) == NAMES
    full = {row.task for row in tasks.benchmarks().values() if row.edition == "full"}
    assert full == {tasks.benchmark(name).task for name in NAMES}


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps({name: prompts(name) for name in NAMES}, indent=1, ensure_ascii=False) + "\n")
