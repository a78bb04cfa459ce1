"""Video benchmarks on the drawn world: clips as H.264 files, questions in the columns of the originals.

Beside its questions a maker returns the table "videos": the path of each file below the edition's folder, and its
frames, uint8 (8, 96, 96, 3).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pruneval.tasks.pocket.clips import EVENTS, SKILLS, Clip, ask, draw, render_clip
from pruneval.tasks.pocket.items import LETTERS, Row, Tables, stream
from pruneval.tasks.pocket.questions import Question, choose

TASK_TYPES = {"moved": "Object Recognition", "direction": "Action Recognition", "order": "Temporal Reasoning",
              "count": "Counting Problem"}  # fmt: skip
DURATIONS = ("short", "medium", "long")
PARTS = {"moving_direction": "direction", "moving_count": "count", "object_existence": "moved",
         "action_sequence": "order"}  # fmt: skip
"""Four of MVBench's sub-tasks, with the skill that stands in for each."""


def videomme(seed: int, number: int) -> Tables:
    """Three questions per clip, each with four options that carry their letters; the clips are all short."""
    rows: list[Row] = []
    videos: list[Row] = []
    for index in range(number // 3):
        rng = stream(seed, "videomme", index)
        clip = _clip(rng, index)
        name = f"clip{index:03d}"
        videos.append({"path": f"videos/{name}.mp4", "video": render_clip(clip)})
        for turn in range(3):
            question = _question(clip, rng, SKILLS, 4)
            rows.append(
                {
                    "video_id": f"{index + 1:03d}",
                    "duration": DURATIONS[index % 3],
                    "domain": "Knowledge",
                    "sub_category": "Technology",
                    "url": "",
                    "videoID": name,
                    "question_id": f"{index + 1:03d}-{turn + 1}",
                    "task_type": TASK_TYPES[question.skill],
                    "question": question.text,
                    "options": [f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False)],
                    "answer": question.answer,
                }
            )
    return {"test": rows, "videos": videos}


def mvbench(seed: int, number: int) -> Tables:
    """A table per sub-task; the answer is the text of a candidate."""
    tables: Tables = {"videos": []}
    for part, skill in PARTS.items():
        tables[part] = []
        for index in range(number // len(PARTS)):
            rng = stream(seed, f"mvbench/{part}", index)
            clip, question = _asked(rng, index, skill)
            name = f"{part}{index:03d}.mp4"
            tables["videos"].append({"path": f"videos/{name}", "video": render_clip(clip)})
            tables[part].append(
                {
                    "video": name,
                    "question": question.text,
                    "candidates": list(question.choices),
                    "answer": question.choices[question.letter_index],
                }
            )
    return tables


def video_qa(seed: int, number: int) -> Tables:
    """Open questions with answers of one word, in turn about each skill."""
    rows: list[Row] = []
    videos: list[Row] = []
    for index in range(number):
        clip, question = _asked(stream(seed, "video_qa", index), index, SKILLS[index % len(SKILLS)], choices=False)
        name = f"video{index:04d}"
        videos.append({"path": f"videos/{name}.mp4", "video": render_clip(clip)})
        rows.append(
            {"video_name": name, "question_id": f"{index}", "question": question.text, "answer": question.answer}
        )
    return {"test": rows, "videos": videos}


def _clip(rng: np.random.Generator, index: int) -> Clip:
    return draw(rng, ("test", "heldout")[index % 2], EVENTS[index // 2 % len(EVENTS)])


def _question(clip: Clip, rng: np.random.Generator, skills: tuple[str, ...], least: int) -> Question:
    """A question of any of the skills that has at least so many possible answers, with four choices at most."""
    while True:
        question = ask(clip, rng, skills[int(rng.integers(len(skills)))])
        if question is not None and len(question.options) >= least:
            return replace(choose(question, rng, 4), hint="")


def _asked(rng: np.random.Generator, index: int, skill: str, choices: bool = True) -> tuple[Clip, Question]:
    while True:
        clip = draw(rng, ("test", "heldout")[index % 2])
        question = ask(clip, rng, skill)
        if question is not None:
            return clip, replace(choose(question, rng, 4), hint="") if choices else question
