"""Clips of the pocket world show what their questions are about, and video files keep it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pruneval.tasks.pocket import clips, video_prompts
from pruneval.tasks.pocket.clips import FRAMES, Clip
from pruneval.tasks.pocket.questions import choose
from pruneval.tasks.pocket.world import HELDOUT_PAIRS, SIZE, Scene, render


def drawn(number: int, split: str = "train", event: str | None = None) -> list[Clip]:
    rng = np.random.default_rng(3)
    return [clips.draw(rng, split, event) for _ in range(number)]


def test_a_clip_is_the_same_every_time() -> None:
    one, two = drawn(3), drawn(3)
    assert one == two
    assert (clips.render_clip(one[0]) == clips.render_clip(two[0])).all()


@pytest.mark.parametrize("event", clips.EVENTS)
def test_pixels_change_where_things_are_and_nowhere_else(event: str) -> None:
    for clip in drawn(10, event=event):
        frames = clips.render_clip(clip).astype(int)
        assert frames.shape == (FRAMES, SIZE, SIZE, 3)
        change = abs(frames - render(Scene((), clip.seed))).max(-1)
        for frame, picture in enumerate(change):
            for actor in clip.actors:
                if actor.path[frame]:
                    top, left = actor.path[frame]
                    box = picture[top : top + actor.size, left : left + actor.width]
                    assert box.shape == (actor.size, actor.width) and (box > 60).mean() > 0.1
                    box[:] = 0
            assert picture.max() < 30


def test_one_thing_moves_and_keeps_clear_of_the_others() -> None:
    for clip in drawn(30, event="move"):
        movers = [a for a in clip.actors if a.direction]
        assert len(movers) == 1 and all(len(set(a.path)) == 1 for a in clip.actors if not a.direction)
        (top, left), (end_top, end_left) = movers[0].path[0], movers[0].path[-1]
        way = {"left": left - end_left, "right": end_left - left, "up": top - end_top, "down": end_top - top}
        assert way[movers[0].direction] >= clips.LEAST_MOVE
        assert sorted(map(abs, way.values()))[:2] == [0, 0]


def test_things_appear_in_the_order_of_the_actors() -> None:
    for clip in drawn(30, event="appear"):
        starts = [a.start for a in clip.actors]
        assert starts == sorted(set(starts))
        assert len({a.kind for a in clip.actors}) == len(clip.actors)


@pytest.mark.parametrize("skill", clips.SKILLS)
def test_answers_are_among_the_options(skill: str) -> None:
    rng = np.random.default_rng(0)
    asked = [q for clip in drawn(60) if (q := clips.ask(clip, rng, skill))]
    assert len(asked) > 15 and len({q.answer for q in asked}) > 1
    for question in asked:
        assert question.answer in question.options and question.evidence


def test_held_out_pairs_are_held_out() -> None:
    def pairs(clip: Clip) -> set[tuple[str, str]]:
        return {(a.kind, a.colour) for a in clip.actors}

    assert not any(pairs(clip) & HELDOUT_PAIRS for split in ("train", "test") for clip in drawn(40, split))
    assert all(pairs(clip) & HELDOUT_PAIRS for clip in drawn(40, "heldout"))


@pytest.mark.parametrize("call, message", [
    (lambda rng: clips.draw(rng, "dev"), "unknown split 'dev'"),
    (lambda rng: clips.draw(rng, event="jump"), "unknown event 'jump'"),
    (lambda rng: clips.ask(clips.draw(rng), rng, "speed"), "unknown skill 'speed'"),
])  # fmt: skip
def test_what_does_not_exist_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0))


def test_a_video_file_keeps_the_frames(tmp_path: Path) -> None:
    import av

    frames = clips.render_clip(drawn(1)[0])
    clips.write_video(tmp_path / "clip.mp4", frames, fps=2)
    with av.open(str(tmp_path / "clip.mp4")) as file:
        assert float(file.streams.video[0].average_rate) == 2
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert back.shape == frames.shape
    assert abs(back.astype(int) - frames).mean() < 1.5
    with pytest.raises(ValueError, match="uint8"):
        clips.write_video(tmp_path / "clip.mp4", frames.astype(float), fps=2)


def test_prompts_are_those_of_the_benchmarks() -> None:
    mvbench = pytest.importorskip("lmms_eval.tasks.mvbench.utils")
    videomme = pytest.importorskip("lmms_eval.tasks.videomme.utils")
    rng = np.random.default_rng(1)
    question = choose(clips.ask(drawn(1, event="move")[0], rng, "direction"), rng, 4)
    doc = {"question": question.text, "candidates": list(question.choices)}
    assert video_prompts.mvbench(question) == mvbench.mvbench_doc_to_text(doc, {"post_prompt": video_prompts.BEST})
    doc["options"] = [f"{'ABCD'[i]}. {choice}" for i, choice in enumerate(question.choices)]
    post = {"post_prompt": "\nAnswer with the option's letter from the given choices directly."}
    assert video_prompts.videomme(question) == videomme.videomme_doc_to_text(doc, post)
