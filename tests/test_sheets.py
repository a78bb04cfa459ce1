"""Any-resolution images and pooled frames: how many tokens they make, and which cell of which tile each is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_anyres as tiny
import torch
from steps_anyres import one
from transformers import LlavaNextConfig, LlavaOnevisionConfig

from pruneval.harness.adapters import Encoding
from pruneval.harness.adapters.llava_next import LlavaNext
from pruneval.harness.adapters.llava_onevision import LlavaOnevision

SMALL, LARGE = tiny.picture(60, 80), tiny.picture(250, 250)
COUNTS = {
    "llava_next": {(56, 56): 36, (80, 107): 70, (180, 320): 52, (20, 200): 42},
    "llava_onevision": {(42, 42): 21, (60, 80): 37, (120, 210): 81, (250, 250): 99},
    "llava_next_video": {(80, 107): 70},
}
OTHERS = [(100, 40), (333, 90), (43, 255), (199, 200)]
SIZES = [(family, size) for family, sizes in COUNTS.items() for size in [*sizes, *OTHERS]]


def packed(model: Any, cells: torch.Tensor, size: tuple[int, int], fill: float) -> torch.Tensor:
    """(tiles, P, k) cells of an image through the model's own packing, with `fill` as newline: (N, k)."""
    newline = torch.full((cells.shape[-1],), fill, dtype=cells.dtype)
    extra = {} if model.config.model_type == "llava_onevision" else {"vision_feature_select_strategy": "default"}
    made, _ = model.model.pack_image_features([cells], torch.tensor([size]), image_newline=newline, **extra)
    return made[0]


@pytest.mark.parametrize(("family", "size"), SIZES, ids=str)
def test_cells_become_tokens_as_the_model_packs_features(family, size):
    model, step = tiny.model(family), one(family, tiny.picture(*size))
    view = step.vision
    assert step.total == COUNTS[family].get(size, step.total) and view.images == (view.tiles,)
    side = view.grid[0]
    cells = torch.randn(view.tiles, side * side, 3, dtype=torch.float64)
    theirs = packed(model, cells, size, -7.0)
    assert len(theirs) == step.total
    torch.testing.assert_close(view.to_tokens(cells, -7.0), theirs, rtol=0, atol=1e-12)
    expected = theirs[:, 1].where(~view.is_newline(), float("nan"))
    torch.testing.assert_close(view.to_tokens(cells[..., 1]), expected, rtol=0, atol=1e-12, equal_nan=True)

    # tile and cell of each token: exact where tokens are cells, the one below the middle where they are resampled
    number = torch.arange(view.tiles * side * side, dtype=torch.float64).reshape(view.tiles, -1, 1)
    mine, tile, cell = packed(model, number, size, -1.0)[:, 0], view.tile_of(), view.cell_of()
    assert torch.equal(view.is_newline(), mine == -1)
    ours = torch.where(tile < 0, -1, tile * side * side + cell)
    back = view.token_of()
    if family == "llava_onevision" and size in ((120, 210), (250, 250), (199, 200)):
        assert torch.equal(ours[: side * side], mine[: side * side].long()) and bool((back[1:] == -1).all())
    else:
        assert torch.equal(ours, mine.long())
        assert torch.equal(back[tile[tile >= 0], cell[tile >= 0]], (tile >= 0).nonzero().squeeze(-1))
        assert int((back >= 0).sum()) == int((tile >= 0).sum())


def test_resampled_tokens_name_the_tile_they_lie_in():
    """Where all cells that a token is made of are of one tile, it is the one that is named."""
    view = one("llava_onevision", LARGE).vision
    flags = torch.eye(view.tiles, dtype=torch.float64)[:, None].expand(-1, 9, -1)
    share = view.to_tokens(flags, 0.0)
    sure = share.amax(1) == 1
    assert int(sure.sum()) > 40 and torch.equal(share.argmax(1)[sure], view.tile_of()[sure])
    named = share.gather(1, view.tile_of().clamp(min=0)[:, None])[:, 0][~view.is_newline()]
    assert bool((named >= 0.25 - 1e-9).all())


def test_places_in_sheets():
    view = one("llava_onevision", SMALL).vision  # 4 x 6 cells of 2 x 2 tiles are left of 6 x 6
    place, sheet, newline = view.place_of(), view.sheet_of(), view.is_newline()
    assert sheet.tolist() == [0] * 9 + [1] * 28
    assert place[:9].tolist() == [[r, c] for r in range(3) for c in range(3)]
    assert place[9:].tolist() == [[r, c] for r in range(4) for c in range(7)]
    assert newline.nonzero().squeeze(-1).tolist() == [15, 22, 29, 36]
    assert view.tile_of()[9:16].tolist() == [1, 1, 1, 2, 2, 2, -1]
    assert view.cell_of()[9:16].tolist() == [3, 4, 5, 3, 4, 5, -1]

    group = one("llava_onevision", SMALL, LARGE).vision
    assert group.images == (1, 1) and group.sheet_of().tolist() == [0] * 10 + [1] * 10
    assert group.is_newline().nonzero().squeeze(-1).tolist() == [9, 19] and group.place_of()[9].tolist() == [3, 0]

    flat = one("llava_onevision", SMALL, tiny.picture(42, 42), nested=False)
    assert flat.vision.images == (5, 2) and flat.total == 58 and flat.spans == ((1, 38), (38, 59))


@pytest.mark.parametrize(("family", "total"), [("llava_onevision", 33), ("llava_next_video", 32)])
def test_frames_are_pooled_as_the_model_pools(family, total):
    model, step = tiny.model(family), one(family, videos=(tiny.clip(8),))
    view, width = step.vision, model.config.vision_config.hidden_size
    assert step.total == total and view.images == (8,)
    cells = torch.randn(8, view.grid[0] ** 2, width, dtype=torch.float64)
    if family == "llava_onevision":
        pooled = model.model.apply_pooling(cells).flatten(0, 1)
        pooled = torch.cat([pooled, torch.full((1, width), -7.0)])
    else:
        pooled = model.model.vision_resampler(cells).flatten(0, 1)
    torch.testing.assert_close(view.to_tokens(cells, -7.0), pooled, rtol=0, atol=1e-12)
    torch.testing.assert_close(view.to_tokens(cells[..., 0], -7.0), pooled[:, 0], rtol=0, atol=1e-12)
    frames = [frame for frame in range(8) for _ in range(4)]
    assert view.tile_of().tolist() == frames + [-1] * (total - 32) and view.sheet_of()[:32].tolist() == frames
    assert view.grids == ((2, 2),) * 8 and bool((view.token_of() == -1).all())


REAL = {
    LlavaNext: {
        (336, 336): 1176, (480, 640): 2340, (1080, 1920): 1948, (899, 1024): 2634, (640, 480): 2352, (100, 1000): 1160,
        (672, 672): 2928,
    },
    LlavaOnevision: {
        (384, 384): 1485, (480, 640): 2929, (899, 1024): 6551, (1080, 1920): 7269, (2304, 2304): 7371,
        (100, 1000): 1467,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", REAL)
def test_counts_of_the_released_models(family):
    """What the processors of the released sizes make of images and clips."""
    config = LlavaNextConfig() if family is LlavaNext else LlavaOnevisionConfig()
    adapter, run = family(SimpleNamespace(config=config)), Encoding("image", {}, (), {}, {})
    found = {size: sum(s.tokens for s in adapter.image(torch.tensor(size), True, run)) for size in REAL[family]}
    assert found == REAL[family]
    if family is LlavaOnevision:
        assert sum(sheet.tokens for sheet in adapter.image(torch.tensor((480, 640)), False, run)) == 730
        assert [sum(sheet.tokens for sheet in adapter.video(frames)) for frames in (1, 8, 32)] == [197, 1569, 6273]
