"""Where visual tokens stand: which image or video they are of, and at which place of its grids."""

from __future__ import annotations

from pruneval.methods.step import Step, torch


def images(step: Step) -> list[torch.Tensor]:
    """Numbers 0..N-1 of the visual tokens of each image or video.

    A video of `Step.clips` is one, whatever text is between its frames.
    """
    label = torch.bucketize(step.visual, step.visual.new_tensor([stop for _, stop in step.spans]), right=True)
    for clip in step.clips:
        mine = label[torch.isin(step.visual, clip)].unique()
        label[torch.isin(label, mine)] = mine[0]
    return [(label == each).nonzero().squeeze(-1) for each in label.unique()]


def places(step: Step) -> torch.Tensor:
    """(N, 3) number of the grid each visual token is in (sheet or tile), its row and its column; newlines stand right
    of their row. Not for videos that have tokens outside their frames.
    """
    view = step.vision
    if step.shape.sheets:
        return torch.cat([view.sheet_of()[:, None], view.place_of()], dim=1).to(step.visual.device)
    inside = torch.cat([torch.cartesian_prod(*map(torch.arange, size)) for size in view.grids])
    sizes = torch.tensor([rows * columns for rows, columns in view.grids])
    grid = torch.arange(len(sizes)).repeat_interleave(sizes)
    return torch.cat([grid[:, None], inside], dim=1).to(step.visual.device)
