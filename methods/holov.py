"""HoloV (NeurIPS 2025, arXiv 2510.02912; obananas/HoloV at 1d2e65e), without its refetching of dropped tokens.

The tokens of an image are cut, in the order of the prompt, into `crops` runs of equal length (strips of a few rows, not
squares). A token's score is a + weight * gamma * v: a is the attention of the CLS token in the layer whose output is
projected (received attention where there is none), v the variance of the token's cosines to the others of its crop (the
0 on the diagonal counted in), gamma the ratio of the means of a and v in the crop. A crop's share of the budget follows
its mean score; what it has no room for goes to the others, by score and room, as the paper has it (the released code
fills up with zeros). In a crop the tokens with the highest attention stay, the most attended first.

In `variant` = paper the weight is 1 instead of 0.09, and the score chooses within crops. As gamma is taken per crop,
v does not change a crop's mean by more than a common factor: in the released code only attention decides.

One image or video is a joint sequence, without newlines and the CLS tokens of video frames, which go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pruneval.methods.base import (
    Card,
    Method,
    MethodError,
    Needs,
    Positions,
    Reduction,
    Shape,
    Step,
    kept,
    torch,
)
from pruneval.methods.grids import images
from pruneval.methods.salience import spread, token_salience

TINY = 1e-6


@dataclass(frozen=True)
class HoloV(Method):
    """Keeps a fraction `keep` of the visual tokens.

    `crops` is a number, or auto: 1024 / 576 for every n / T, when T of an image's n tokens stay; 16 for 64 of 576.
    `order` is attention or prompt: how the tokens of a crop stand.
    """

    card: ClassVar[Card] = Card(
        "holov",
        "HoloV",
        seam=("embed",),
        summary="Gives each strip of an image its share by attention and variety; keeps its most attended tokens "
        "(without refetching dropped ones).",
        paper='Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention',
        year=2025,
        arxiv="2510.02912",
        repository="obananas/HoloV",
        commit="1d2e65e",
        reorders=True,
    )
    presets: ClassVar[dict[str, dict[str, str | int | float | bool]]] = {
        **{f"llava-1.5-7b@{count}": {"keep": count / 576} for count in (192, 128, 64)},
    }

    keep: float = 0.5
    crops: str = "auto"
    variant: Literal["code", "paper"] = "code"
    order: Literal["attention", "prompt"] = "attention"
    position_mode: Positions = "compact"

    def check(self) -> None:
        for name, known in (("variant", ("code", "paper")), ("order", ("attention", "prompt"))):
            if getattr(self, name) not in known:
                raise MethodError(f"holov: {name} must be {' or '.join(known)}, not {getattr(self, name)!r}")
        if self.crops != "auto" and not (self.crops.isdecimal() and int(self.crops)):
            raise MethodError(f"holov: crops must be auto or a number, not {self.crops!r}")

    def needs(self, shape: Shape) -> dict[int, Needs]:
        return {0: Needs(vision=(shape.feature_layer,), frames=True)}

    def schedule(self, shape: Shape, n: int) -> list[int]:
        return [kept(n, self.keep)] * shape.layers

    def reduce(self, step: Step) -> Reduction | None:
        count = kept(step.total, self.keep)
        if count >= step.total:
            return None
        attention, hidden = self.score(step).to(step.visual.device), step.hidden[step.visual]
        bare = attention.isnan().nonzero().squeeze(-1)
        groups = [group[~torch.isin(group, bare)] for group in images(step)]
        chosen = [
            group[self.choose(attention[group], hidden[group], share)]
            for group, share in zip(groups, spread(count, [len(group) for group in groups]), strict=True)
        ]
        chosen = torch.cat(chosen)
        chosen = torch.cat([chosen, bare[: count - len(chosen)]])
        return step.keep(chosen) if self.order == "prompt" else in_place(step, chosen)

    def score(self, step: Step) -> torch.Tensor:
        """(N,) attention to the visual tokens; nan where no cell is."""
        return token_salience(step)

    def choose(self, attention: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """Which `count` of an image's tokens (n, d) stay, in the order in which they go on."""
        n = len(attention)
        if count in (0, n):
            return torch.arange(count, device=attention.device)
        crops = max(1, int(1024 / 576 * n / count)) if self.crops == "auto" else int(self.crops)
        runs = torch.arange(n, device=attention.device).tensor_split(min(crops, n))
        scores = [self.scores(attention[run], tokens[run]) for run in runs]
        shares = quotas(torch.stack([score.mean() for score in scores]).tolist(), [len(run) for run in runs], count)
        chosen = []
        for run, score, share in zip(runs, scores, shares, strict=True):
            best = torch.sort(score if self.variant == "paper" else attention[run], descending=True, stable=True)
            mine = best.indices[:share]
            chosen.append(run[mine.sort().values if self.order == "prompt" or share == len(run) else mine])
        return torch.cat(chosen)

    def scores(self, attention: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(m,) the scores of a crop."""
        if len(tokens) == 1:
            return attention
        unit = torch.nn.functional.normalize(tokens.to(attention.dtype), dim=-1)
        alike = (unit @ unit.T).fill_diagonal_(0)
        others = len(tokens) - 1
        variance = (alike - alike.sum(1, keepdim=True) / others).square().sum(1) / others
        gamma = attention.mean() / (variance.mean() + TINY)
        return attention + (1.0 if self.variant == "paper" else 0.09) * gamma * variance


def quotas(weights: list[float], sizes: list[int], total: int) -> list[int]:
    """`total` tokens over crops: by weight, rounded down; one more each for the heaviest until all are given; what a
    crop has no room for to others, by weight times room.
    """
    shares = _given(total, weights, [total] * len(weights))
    over = sum(max(0, share - size) for share, size in zip(shares, sizes, strict=True))
    shares = [min(share, size) for share, size in zip(shares, sizes, strict=True)]
    while over:
        room = [size - share for share, size in zip(shares, sizes, strict=True)]
        wanted = [weight * free for weight, free in zip(weights, room, strict=True)]
        more = _given(over, wanted, room)
        shares = [share + extra for share, extra in zip(shares, more, strict=True)]
        over -= sum(more)
    return shares


def _given(total: int, weights: list[float], room: list[int]) -> list[int]:
    """`total` by weight, rounded down, and one more each for the heaviest; never more than there is room."""
    whole = sum(weights)
    exact = [total * weight / whole if whole else total / len(weights) for weight in weights]
    shares = [min(int(part), free) for part, free in zip(exact, room, strict=True)]
    heaviest = sorted(range(len(weights)), key=lambda crop: -weights[crop])
    with_room = [crop for crop in heaviest if shares[crop] < room[crop]]
    for crop in with_room[: total - sum(shares)]:
        shares[crop] += 1
    return shares


def in_place(step: Step, chosen: torch.Tensor) -> Reduction:
    """The visual tokens number `chosen` in this order, those of each image where the image was."""
    visual = step.visual[chosen]
    image = torch.bucketize(visual, visual.new_tensor([stop for _, stop in step.spans]), right=True)
    start = visual.new_tensor([start for start, _ in step.spans])[image]
    order = torch.sort(torch.cat([step.text, start]), stable=True).indices
    return Reduction(torch.cat([step.text, visual])[order])
