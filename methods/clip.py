"""What a method sees of the CLIP model that a vision tower comes from: its question and its cells in one space.

Asked for by `Needs(clip=True)`, together with the vision layers whose cells are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Clip(Protocol):
    """One sample's question, embedded by CLIP's text encoder, in float32 (or the model's higher precision).

    The question is the prompt's text behind the last visual token, without the chat template and without the sentence
    that asks for a short answer. Nothing is normalised here.

    Attributes:
        question: (p,) the embedding of the question, cut at the encoder's length.
        segments: (M, p) those of the whole question, cut into pieces of the encoder's length. Only the first piece has
            a start token and only the last an end token, and CLIP pools where it finds the end token: of a longer
            question, all pieces but the last give what CLIP gives for their first token.
        padded: (p,) the question padded to the encoder's length without a mask: the state of the last position,
            projected.
    """

    question: Tensor
    segments: Tensor
    padded: Tensor

    def project(self, hidden: Tensor, norm: bool = True) -> Tensor:
        """(..., d_v) outputs of a vision layer through the vision tower's last norm (unless `norm` is False) and CLIP's
        projection: (..., p).
        """
