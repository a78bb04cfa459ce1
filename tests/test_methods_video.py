"""What the video methods share: frames, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from films import MOVING, run
from steps import shape

from pruneval import methods
from pruneval.harness import subjects
from pruneval.harness.adapters import adapter_for
from pruneval.harness.adapters.internvl import TileView
from pruneval.methods.base import MethodError

build = methods.build


@pytest.mark.parametrize(("family", "index"), MOVING.items())
def test_clips_are_the_frames_of_a_video(family, index):
    subject = subjects.subject(family)
    _, session, _ = run(subject.model("sdpa"), subject.samples[index], build("framefusion", {"keep": 1}), 1)
    prompt = session.trace.prompt.samples[0]
    clips = []
    kind = type(session.method)

    class Probe(kind):
        def reduce(self, step):
            clips.append(step.clips)

    run(subject.model("sdpa"), subject.samples[index], Probe(), 1)
    (clip,) = clips[0]
    visual = prompt.visual.nonzero().squeeze(-1)
    frames = 2 if family == "qwen2_5_vl" else 4
    extra = {"llava_onevision": 1, "video_llava": 4}.get(family, 0)  # a newline, four CLS tokens
    assert clip.shape == (frames, (len(visual) - extra) // frames)
    assert torch.isin(clip, visual).all() and len(clip.unique()) == clip.numel()
    assert (clip.diff(dim=1) == 1).all() and (clip.diff(dim=0) > 0).all()
    if family == "video_llava":
        assert (clip[:, 0] - visual[0]).tolist() == [1, 18, 35, 52]  # each frame's CLS comes first
    elif extra:
        assert clip[-1, -1] + 1 == visual[-1]


def test_images_are_no_clips_and_tiles_in_a_row_are():
    model = subjects.tiny("internvl")
    view = TileView(adapter_for(model), [])
    for images, sizes in (((3,), []), ((1,), []), ((1, 3), []), ((1, 1, 1), [3]), ((1, 1, 3, 1, 1, 1), [2, 3])):
        view.images = images
        assert [len(clip) for clip in view.clips()] == sizes
    view.images = (3, 1, 1)
    assert view.clips()[0].tolist() == [[12, 13, 14, 15], [16, 17, 18, 19]]


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("dycoke", {"layer": 0}, "at least 1"),
        ("dycoke", {"otherwise": "no"}, "all or reuse"),
        ("dycoke", {"order": "no"}, "similarity or raster"),
        ("dycoke", {"odd": "no"}, "keep or drop"),
        ("dycoke", {"decode_keep": 2}, r"in \[0, 1\]"),
        ("framefusion", {"threshold": 2}, r"in \[-1, 1\]"),
        ("framefusion", {"saturated": 2}, r"in \[0, 1\]"),
        ("prunevid", {"temporal": 0}, "temporal must be"),
        ("prunevid", {"stages": "no"}, "both, merge or select"),
        ("prunevid", {"earlier": "no"}, "shrunk or full"),
        ("prunevid", {"least": 2}, "0 or 1"),
    ],
)
def test_nonsense_is_refused(name, params, said):
    with pytest.raises(MethodError, match=said):
        build(name, params)


@pytest.mark.parametrize("name", ["dycoke", "framefusion", "prunevid"])
def test_presets_are_valid(name):
    for params in methods.method_class(name).presets.values():
        assert build(name, params).needs(shape())
