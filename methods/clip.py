"""What a method sees of the CLIP model that a vision tower comes from: its question and its cells in one space.

Asked for by `Needs(clip=True)`, together with the vision layers whose cells are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pruneval.methods.step import Step, torch

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
        padded: (p,) the question padded to the encoder's length: the state of the last position, projected.
    """

    question: Tensor
    segments: Tensor
    padded: Tensor

    def project(self, hidden: Tensor) -> Tensor:
        """(..., d_v) outputs of a vision layer through the vision tower's last norm and CLIP's projection: (..., p)."""


def cell_features(step: Step) -> torch.Tensor:
    """(N, d_v) what the vision layer that is projected gives for each visual token, resampled or pooled as the model
    does it; nan for newlines.
    """
    cells = [each[int(step.vision.has_cls) :] for each in step.vision.hidden(step.shape.feature_layer)]
    return step.vision.to_tokens(torch.stack(cells)) if step.shape.sheets else torch.cat(cells)
