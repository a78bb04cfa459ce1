"""What a method sees of a helper: a second, small model that reads the same images and says which tokens matter.

Asked for by `Needs(helper=Reading(...))`. The helper's visual tokens are those of the model that is pruned, one by one
and in the same order; the text around them may be another, in the helper's own tokens and chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from pruneval.methods.views import Attention


@dataclass(frozen=True)
class Reading:
    """How the helper reads a prompt.

    Attributes:
        answer: tokens it answers with at most, greedily; with 0 it only reads.
        attention: whether the attention of its decoder layers is wanted.
        question_first: whether the user's text goes in front of the images, so that they are read in its light.
        lora: low-rank weights that it has meanwhile, by the name of a linear layer in its decoder
            ("layers.0.self_attn.q_proj"): (r, in) and (r, out) with the output x A^T B added to the layer's.
        again: the share of visual tokens with which the method lets it read its answer once more (`Helper.agreement`).
    """

    answer: int = 0
    attention: bool = False
    question_first: bool = False
    lora: Mapping[str, tuple[Tensor, Tensor]] | None = None
    again: float = 0.0


class Helper(Protocol):
    """The helper's view of one sample; numbers are float32 (or the helper's higher precision).

    Attributes:
        visual: (N,) places of the visual tokens in the helper's prompt, ascending.
        length: n, tokens of its prompt.
        layers: its decoder layers.
        hidden: (n, d) its states behind the last layer and the last norm.
        answered: (t, N) what each token of its answer that was read again gives to the visual tokens, summed over all
            layers and heads. The last token of an answer is not read again.
        answer: (t + 1,) the ids of its answer.
        confidence: (t + 1,) the probability with which it chose each of them.
    """

    visual: Tensor
    length: int
    layers: int
    hidden: Tensor
    answered: Tensor
    answer: Tensor
    confidence: Tensor

    def attention(self, layer: int) -> Attention:
        """The attention of a decoder layer over its prompt; needs `Reading(attention=True)`."""

    def agreement(self, chosen: Tensor) -> Tensor:
        """(t + 1,) the probability it gives each token of its answer when it is shown only these visual tokens.

        Args:
            chosen: their numbers, 0..N-1; the others leave before its first layer, positions stay.

        Raises: MethodError for a helper that adds visual features inside its decoder.
        """
