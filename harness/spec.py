"""What one cell is: one model, one method with its parameters, one benchmark. No torch, no files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FRAMES = 8
"""Of each video, where nothing else is said: what the papers use."""
NOT_IDENTITY = ("given",)
"""What the user typed does not matter once its values are known: `keep=0.5` said or defaulted is the same cell."""
SOMETIMES = ("frames", "judge", "text_tower")
"""What most cells do not have: it counts only where it is there, and older records do not name it."""


def sampling(frames: int) -> str:
    """How a record names evenly spaced frames, the first and the last among them: "linspace:8"."""
    return f"linspace:{frames}"


def code_version() -> str:
    """Major and minor version of this package, the part of it that may change answers."""
    try:
        return ".".join(version("pruneval").split(".")[:2])
    except PackageNotFoundError:
        return "0"


def signature_of(method: str, params: Mapping[str, Any]) -> str:
    """Name and parameters, as `fastv(layer=2,keep=0.5)`; the same text as `Method.signature`."""
    inner = ",".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()
    )
    return f"{method}({inner})" if inner else method


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides the answers of a cell. Batch size, device and speed do not, and are not here."""

    model: str
    revision: str
    """The hub's commit, or a hash of the files of a local folder."""
    method: str
    params: dict[str, Any]
    """Every parameter of the method with its value, in the method's order."""
    given: dict[str, Any]
    """The parameters the user passed; not part of the identity."""
    benchmark: str
    edition: str
    data: str
    """The data's revision; for a pocket edition the hash of the code that draws it."""
    limit: int | None
    seed: int
    dtype: str
    kernel: str
    num_beams: int | None = None
    """Beams of the search; None leaves it to the benchmark's task."""
    positions: str
    """Position ids after a reduction: "original" or "compact"."""
    prompt_key: str
    """The key under which lmms-eval's task chose its prompt."""
    version: str
    frames: str = ""
    """How videos are sampled, as "linspace:8"; "" where questions are about images."""
    judge: str = ""
    """The language model that scores, as "gpt-4@api.example.org"; "" where none does."""
    text_tower: str = ""
    """What embeds the question in CLIP's space, as "clip-vit-large-patch14-336@ce19dc91"; "" where the method asks for
    none.
    """

    @cached_property
    def hash(self) -> str:
        """The name of the cell's folder."""
        empty = [key for key in SOMETIMES if not getattr(self, key)]
        identity = {key: value for key, value in asdict(self).items() if key not in (*NOT_IDENTITY, *empty)}
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def method_signature(self) -> str:
        """Name and parameters of the method."""
        return signature_of(self.method, self.params)

    def signature(self, avg_in: float | None = None) -> str:
        """What a printed number carries, as `pruneval|fastv(layer=2,keep=0.5)|model@rev|pos:original|…`.

        A type other than float32, a limit, a seed other than 0, frames, a judge and a text tower are named too.

        Args:
            avg_in: the realised budget: mean over layers of visual tokens that enter the layer.
        """
        parts = ["pruneval", self.method_signature, f"{self.model}@{self.revision[:8]}", f"pos:{self.positions}"]
        parts.append(f"kernel:{self.kernel}")
        if self.num_beams is not None:
            parts.append(f"beams:{self.num_beams}")
        if self.dtype != "float32":
            parts.append(f"dtype:{self.dtype}")
        if self.limit is not None:
            parts.append(f"limit:{self.limit}")
        if self.seed:
            parts.append(f"seed:{self.seed}")
        parts += [f"{key}:{getattr(self, key)}" for key in SOMETIMES if getattr(self, key)]
        if avg_in is not None:
            parts.append(f"budget:avg_in={avg_in:.4g}")
        return "|".join([*parts, f"v:{self.version}"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunSpec:
        """The spec a record holds. Raises: KeyError when a field is missing."""
        # `num_beams` has a default and is in every record all the same.
        known = [item.name for item in fields(cls) if item.name in data or item.name not in SOMETIMES]
        return cls(**{name: data[name] for name in known})
