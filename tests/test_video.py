"""Videos: frames as they were written, even sampling, files that cannot be read, and what the processor is given."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scripting

from pruneval import tasks
from pruneval.harness import preparing, video
from pruneval.harness.errors import SampleFailure, UserError
from pruneval.harness.evaluate import build_tasks, evaluate
from pruneval.harness.lmms_model import PrunevalModel
from pruneval.tasks.pocket import clips, editions


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory):
    """A file of 20 frames, frame i of grey level 10 i."""
    path = tmp_path_factory.mktemp("film") / "steps.mp4"
    clips.write_video(path, np.repeat(np.arange(0, 200, 10, dtype=np.uint8), 64 * 64 * 3).reshape(20, 64, 64, 3))
    return path


def levels(clip: video.Clip) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in clip.frames]


@pytest.mark.parametrize("whole", [True, False], ids=["decoded", "sought"])
def test_frames_are_evenly_spaced_from_the_first_to_the_last(whole: bool, film, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video, "SOUGHT", 3000 if whole else 0)
    clip = video.read(film, 8)
    # 19 / 7 = 2.71 frames apart, rounded down.
    assert clip.metadata["frames_indices"] == [0, 2, 5, 8, 10, 13, 16, 19] == levels(clip)
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (8, 64, 64, 3)
    assert (clip.metadata["total_num_frames"], clip.metadata["fps"], clip.metadata["duration"]) == (20, 2.0, 10.0)
    assert levels(video.read(film, 1)) == [0] and len(video.read(film, 32).frames) == 32


def test_drawn_clips_come_back_as_they_were_drawn():
    row = editions.rows("videomme")["videos"][0]
    clip = video.read(editions.ensure("videomme") / row["path"], 8)
    assert np.abs(clip.frames.astype(int) - row["video"].astype(int)).mean() < 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"not a video at all", "cannot be read"),
        ("cut", "cannot be read|no frames|ends early"),
    ],
)
def test_a_file_that_is_no_video_is_named(content, message: str, film, tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(film.read_bytes()[:900] if content == "cut" else content)
    with pytest.raises(ValueError, match=f"the video .*broken.mp4 .*({message})|broken.mp4 ({message})"):
        video.read(path)


def test_the_processor_gets_sampled_frames_and_is_told_so():
    processor = SimpleNamespace(video_processor=object())
    clip = video.Clip(np.zeros((4, 8, 8, 3), np.uint8), {"fps": 2.0})
    given = preparing.videos(processor, [clip])
    assert given["do_sample_frames"] is False and given["video_metadata"] == [{"fps": 2.0}]
    assert given["videos"][0] is clip.frames and preparing.videos(processor, []) == {}
    with pytest.raises(UserError, match=r"'llava-1.5-7b' takes no videos"):
        preparing.videos(SimpleNamespace(), [clip], "llava-1.5-7b")


def right(row: dict, index: int) -> str:
    if "candidates" in row:
        return f"({'ABCDE'[row['candidates'].index(row['answer'])]}) {row['answer']}"
    return row["answer"]


def test_videomme_and_mvbench_read_letters(monkeypatch: pytest.MonkeyPatch):
    outcome = scripting.run(monkeypatch, "pocket-videomme", lambda row, i: right(row, i) if i % 3 else "E")
    assert outcome.scores["videomme_perception_score,none"]["value"] == pytest.approx(200 / 3)
    exact = scripting.run(
        monkeypatch, "pocket-tgif_qa_exact", lambda row, i: f"The {row['answer'].upper()}." if i % 2 else "?"
    )
    assert exact.scores["exact_match,none"]["value"] == pytest.approx(0.5)


def test_mvbench_is_the_mean_of_its_parts_and_counts_empty_answers(monkeypatch: pytest.MonkeyPatch):
    row, tables = tasks.benchmark("pocket-mvbench"), editions.rows("mvbench")
    assert row.tasks == tuple(f"mvbench_{part}" for part in row.parts)

    def generate(self, batch, session):
        found = []
        for request in batch:
            part, index = request.key.removeprefix("mvbench_").split("/")
            answer = right(tables[part][int(index)], 0) if part != "moving_count" or int(index) % 3 else ""
            found.append(
                {"key": request.key, "doc_id": request.doc_id, "request": request.digest, "prompt": request.context,
                 "prompt_hash": "", "answer": answer}
            )  # fmt: skip
        return found

    scripting.unseen(monkeypatch)
    monkeypatch.setattr(PrunevalModel, "_generate", generate)
    outcome = evaluate(None, None, row, batch_size=32)
    values = {key: score["value"] for key, score in outcome.scores.items()}
    # A third of one part's answers is empty: wrong, not left out.
    assert values["mvbench_moving_count"] == pytest.approx(100 * 10 / 15)
    assert values["mvbench_accuracy,none"] == pytest.approx((300 + 100 * 10 / 15) / 4)
    assert next(iter(values)) == "mvbench_accuracy,none" and len(values) == 5
    assert list(outcome.samples.doc_id) == list(range(60)) and outcome.samples.correct.sum() == 55


class Blind:
    """A processor that must not be reached."""


def test_a_video_that_is_gone_fails_its_sample(monkeypatch: pytest.MonkeyPatch, tmp_path):
    row = tasks.benchmark("pocket-tgif_qa_exact")
    (task,) = build_tasks(row)
    assert task.doc_to_visual(task.eval_docs[0])[0].endswith("videos/video0000.mp4")
    source = editions.ensure("video_qa")
    (tmp_path / "videos").mkdir()
    (tmp_path / "test.parquet").write_bytes((source / "test.parquet").read_bytes())
    monkeypatch.setattr(editions, "ensure", lambda name: tmp_path)
    loaded = SimpleNamespace(processor=Blind(), entry=None)
    with pytest.raises(SampleFailure, match=r"sample tgif_qa_exact/[01]: .*/videos/video000[01] is missing"):
        evaluate(loaded, None, row, limit=2, batch_size=2)
