"""Frames of a video file, decoded with PyAV and picked evenly.

The models' own video processors resize and normalise them; they are told not to sample again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pruneval.harness.spec import FRAMES

SOUGHT = 3000
"""Longer videos are not decoded as a whole: each frame is sought by its time."""


@dataclass(frozen=True)
class Clip:
    """Sampled frames and where they come from."""

    frames: np.ndarray
    """uint8 (frames, height, width, 3)."""
    metadata: dict[str, Any]
    """What transformers' video processors want to know: total_num_frames, fps, duration, frames_indices, sizes."""


def read(path: str | Path, frames: int = FRAMES) -> Clip:
    """Evenly spaced frames of a video, the first and the last among them; of a shorter one, some more than once.

    Raises:
        ValueError: the file cannot be read as a video, or has no frames; the message names it.
    """
    import av

    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or 0) or 1.0
            total = stream.frames or _count(file, stream)
            wanted = [int(index) for index in np.linspace(0, total - 1, frames)] if total else []
            found = (_all if total <= SOUGHT else _sought)(file, stream, wanted, rate)
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"the video {path} cannot be read ({type(error).__name__}: {error})") from error
    if not found or len(found) != frames:
        raise ValueError(f"the video {path} has no frames" if not found else f"the video {path} ends early")
    stacked = np.stack(found)
    height, width = stacked.shape[1:3]
    return Clip(
        stacked,
        {
            "total_num_frames": total,
            "fps": rate,
            "duration": total / rate,
            "frames_indices": wanted,
            "height": height,
            "width": width,
            "video_backend": "pyav",
        },
    )


def _count(file: Any, stream: Any) -> int:
    """Frames of a file whose header does not say: every packet is read, none decoded."""
    total = sum(packet.size > 0 for packet in file.demux(stream))
    file.seek(0)
    return total


def _all(file: Any, stream: Any, wanted: list[int], rate: float) -> list[np.ndarray]:
    last = max(wanted, default=-1)
    kept: dict[int, np.ndarray] = {}
    for index, frame in enumerate(file.decode(stream)):
        if index in set(wanted):
            kept[index] = frame.to_ndarray(format="rgb24")
        if index >= last:
            break
    # A header may promise a frame or two more than there are: the last one there is stands in for them.
    final = kept.get(max(kept)) if kept and last - max(kept) <= 2 else None
    found = (kept.get(index, final) for index in wanted)
    return [frame for frame in found if frame is not None]


def _sought(file: Any, stream: Any, wanted: list[int], rate: float) -> list[np.ndarray]:
    found = []
    for index in wanted:
        time = int(index / rate / stream.time_base) + (stream.start_time or 0)
        file.seek(time, stream=stream)
        last = None
        for frame in file.decode(stream):
            last = frame
            if frame.pts is not None and frame.pts >= time:
                break
        if last is not None:
            found.append(last.to_ndarray(format="rgb24"))
    return found
