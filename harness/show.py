"""`pruneval show`: which patches a run kept, merged and dropped for one question, drawn over its image."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneval.harness.errors import UserError
from pruneval.harness.records import RECORD, RunRecord, read_record, read_samples, write_atomically
from pruneval.tasks import benchmark

if TYPE_CHECKING:
    from pruneval.harness.layout import Trace
    from pruneval.reports.patches import Stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="a run's folder: <results>/<name> with its record")
    add("--beside", type=Path, metavar="DIR", help="a second run of the same model and benchmark, and their overlap")
    add("--sample", type=int, required=True, metavar="K", help="the question's number (doc_id)")
    add("--model", metavar="M", help="where the model is (default: the name in the record)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--save", type=Path, metavar="FILE", help="picture to write: .png, .svg or .pdf (default: in the run's folder)")


def main(args: argparse.Namespace) -> int:
    """Draw the picture and say where it is."""
    import io

    records = [_record(args.run)] + ([_record(args.beside)] if args.beside else [])
    _comparable(records)
    path = args.save or args.run / f"sample-{args.sample}{f'-{args.beside.name}' if args.beside else ''}.png"
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--save must end in .png, .svg or .pdf, not {path.name!r}")
    known = read_samples(args.run, records[0])
    row = known[known["doc_id"] == args.sample]
    if row.empty:
        raise UserError(f"the run has no sample {args.sample}; it has 0 to {int(known['doc_id'].max())}")
    figure, lines = picture(records, args.sample, str(row.iloc[0]["target"]), args.model, args.device)
    out = io.BytesIO()
    figure.savefig(out, format=path.suffix[1:], dpi=120)
    write_atomically(path, out.getvalue())
    print("\n".join(lines))
    print(f"written to {path}", file=sys.stderr)
    return 0


def picture(
    records: list[RunRecord], sample: int, gold: str = "", model: str | None = None, device: str | None = None
) -> tuple[Any, list[str]]:
    """The drawing, and what it says in words.

    Args:
        records: one or two runs of one model on one benchmark.
        sample: the question's number.
        gold: the right answer.
        model: where the model is; None for the record's name.
        device: as `models.load` takes it.

    Raises:
        UserError: another revision of the model than the record's, or no such question.
    """
    from pruneval import methods
    from pruneval.harness import models
    from pruneval.reports import patches

    spec = records[0].spec
    located = models.locate(model or spec.model)
    if located.revision != spec.revision:
        raise UserError(f"the run used {spec.model}@{spec.revision[:8]}, here is {located.revision[:8]}: not the same")
    print(f"loading {spec.model} and question {sample} of {spec.benchmark}", file=sys.stderr)
    loaded = models.load(located, device, spec.dtype, spec.kernel)
    asked = Asked(loaded, spec.benchmark, sample, spec.num_beams)
    reference, seen = asked.look()
    shown = []
    lines = [asked.question, f"unpruned: {reference!r}" + (f"; right: {gold!r}" if gold else "")]
    for record in records:
        method = methods.build(record.spec.method, record.spec.params)
        answer, trace = asked.answer(method, record.spec.seed)
        shown.append(patches.Shown(record.spec.method_signature, answer, stages(trace)))
        counts = [f"{stage.title}: {int((stage.state > 0).sum())}" for stage in shown[-1].stages]
        lines.append(f"{shown[-1].label}: {answer!r}; visual tokens {', '.join(counts) or 'all'}")
    on = patches.canvas(seen["tiles"], seen["boxes"])
    if len(shown) == 2 and all(one.stages for one in shown):
        both = patches.jaccard(shown[0].stages[-1].state, shown[1].stages[-1].state)
        lines.append(f"overlap of the tokens left in the end (Jaccard): {both:.3f}")
    return patches.draw(on, shown, asked.question, reference, gold), lines


class Asked:
    """One question of a benchmark, put to a model."""

    def __init__(self, loaded: Any, name: str, sample: int, num_beams: int | None = None) -> None:
        from pruneval.harness.evaluate import instances_of
        from pruneval.harness.lmms_model import PrunevalModel

        self.loaded = loaded
        self.model = PrunevalModel(loaded, num_beams=num_beams)
        self.all = instances_of(benchmark(name), sample + 1, self.model)
        """This question and those before it."""
        self.instance = next((one for one in self.all if one.args[3] == sample), None)
        if self.instance is None:
            raise UserError(f"benchmark {name!r} has no question {sample}")
        self.question = " ".join(str(self.instance.args[0]).split())

    def answer(self, method: Any, seed: int = 0) -> tuple[str, Trace]:
        """What the model answers while the method prunes, and what left the stream."""
        from pruneval.harness.models import adapter_of
        from pruneval.harness.session import pruned

        with pruned(self.loaded.model, method, seed=seed, adapter=adapter_of(self.loaded, method)) as session:
            row = self.model.ask(self.instance, session)
            return row["answer"], session.trace

    def look(self) -> tuple[str, dict[str, Any]]:
        """The unpruned answer, the tiles and the place of each visual token in them."""
        import numpy as np

        from pruneval.harness.looking import Places

        probe = Places()
        if self.loaded.adapter.supports(probe):
            probe = Places(pixels=False)
        answer, _ = self.answer(probe)
        seen = probe.seen[0]
        if not seen["tiles"]:  # patches of images of any size: the tiles are the images
            seen["tiles"] = [np.asarray(image.convert("RGB")) / 255 for image in self.model.pictures(self.instance)]
        shown = int(np.nanmax(seen["boxes"][:, 0], initial=-1)) + 1
        if not shown or shown > len(seen["tiles"]):
            raise UserError(
                f"the pixels behind this question's {shown} tiles are not at hand for {self.loaded.entry.name}"
            )
        return answer, seen


def stages(trace: Trace) -> tuple[Stage, ...]:
    """What is left behind each reduction of the first sample."""
    import numpy as np

    from pruneval.reports.patches import KEPT, MERGED, Stage

    prompt = trace.prompt.samples[0]
    number = {int(origin): at for at, origin in enumerate(prompt.origin[prompt.visual])}
    found = []
    for layout in trace.layouts:
        tokens = layout.samples[0]
        state = np.zeros(len(number), dtype=int)
        made_new = 0
        for origin, made in zip(
            tokens.origin[tokens.visual].tolist(), tokens.made[tokens.visual].tolist(), strict=True
        ):
            if origin in number:
                state[number[origin]] = MERGED if made else KEPT
            else:
                made_new += 1
        title = f"before layer {layout.boundary}" + (f" (and {made_new} new)" if made_new else "")
        found.append(Stage(title, state))
    return tuple(found)


def _record(folder: Path) -> RunRecord:
    record = read_record(folder)
    if record is None:
        inside = sorted(folder.glob(f"*/{RECORD}"))[:5]
        hint = f"; it holds runs, such as {', '.join(str(path.parent) for path in inside)}" if inside else ""
        raise UserError(f"{folder} is no run's folder{hint}")
    if not record.done:
        raise UserError(f"the run in {folder} failed; there is nothing to show")
    return record


def _comparable(records: list[RunRecord]) -> None:
    for key in ("model", "revision", "benchmark", "data"):
        values = {getattr(record.spec, key) for record in records}
        if len(values) > 1:
            raise UserError(f"the two runs differ in their {key}: {' and '.join(sorted(values))}")
