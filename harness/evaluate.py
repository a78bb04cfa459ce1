"""One model, one method, one benchmark: scores and per-sample rows, through lmms-eval's own task, prompts and metrics.

lmms-eval takes 10 to 20 seconds to import, so it is imported inside the functions.
"""

from __future__ import annotations

import copy
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pruneval.harness.errors import SampleFailure, UserError
from pruneval.harness.guards import refuse
from pruneval.harness.judge import configured, judging, lacking
from pruneval.harness.lmms_task import build_tasks, quiet, unreadable, whole_groups
from pruneval.harness.outcome import Outcome, Part, outcome
from pruneval.harness.ranks import ALONE, Ranks
from pruneval.harness.reuse import shared
from pruneval.harness.spec import FRAMES
from pruneval.tasks import Benchmark

if TYPE_CHECKING:
    from pruneval.harness.batching import BatchSize
    from pruneval.harness.lmms_model import Journal

BUILT = 4
"""Benchmarks whose tasks are kept between the cells of a sweep."""


def evaluate(
    loaded: Any,
    method: Any,
    benchmark: Benchmark,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: BatchSize = 8,
    num_beams: int | None = None,
    frames: int = FRAMES,
    journal: Journal | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Outcome | None:
    """Run a benchmark and score it; None in any but the first of several processes.

    Args:
        loaded: a `LoadedModel`.
        method: a `Method`, or None for the bare model.
        limit: the first so many questions; rows that are scored together (MME's pairs) stay together.
        batch_size: samples per `generate`, or "auto".
        num_beams: beams of the search, or None for what the task says.
        frames: of each video.
        journal: where answers go after every batch; answers already there are not generated again.
        on_progress: called as (done, total).
        ranks: this process among those that share the questions.

    Raises:
        UserError: the data cannot be loaded or scored, or the limit leaves nothing to score.
        SampleFailure: a question could not be answered; nothing is scored.
    """
    judge = configured() if benchmark.judge else None
    if reason := lacking(benchmark):
        raise UserError(reason)
    with quiet(), judging(benchmark, judge):
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
        from tenacity import RetryError

        from pruneval.harness.lmms_model import Elsewhere, PrunevalModel

        tasks = ranks.in_turn(lambda: _tasks(benchmark, loaded), "tasks")  # the first may have to write a data set
        lm = PrunevalModel(
            loaded,
            method,
            batch_size,
            seed,
            num_beams=num_beams,
            frames=frames,
            journal=journal,
            on_progress=on_progress,
            ranks=ranks,
        )
        with tempfile.TemporaryDirectory(prefix="pruneval-") as folder:
            # A folder of its own: some tasks would take the judged answers they find there for this run's.
            arguments = Namespace(output_path=folder, process_with_media=False)  # pictures are not decoded for scoring
            try:
                results = simple_evaluate(
                    model=lm,
                    tasks=tasks,
                    task_manager=TaskManager(include_defaults=False),  # the tasks are built already
                    num_fewshot=0,
                    limit=whole_groups(tasks[0], benchmark, limit),
                    bootstrap_iters=0,
                    log_samples=True,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    cli_args=arguments,
                    process_docs_parallel=1,
                )
            except Elsewhere:
                return None
            except (UserError, SampleFailure, OSError):
                raise
            except Exception as error:
                if _answering(error):
                    raise
                cause = (error.last_attempt.exception() if isinstance(error, RetryError) else None) or error
                raise unreadable(benchmark, cause) from cause
        parts = [
            Part(
                task.config.task,
                results["results"][task.config.task],
                sorted(results["samples"][task.config.task], key=lambda sample: sample["doc_id"]),
                task.aggregation(),
            )
            for task in tasks
        ]
        for part in parts:
            refuse(benchmark, part.logged)
        return replace(outcome(parts, lm.rows, benchmark), batch_size=lm.batched)


def _tasks(benchmark: Benchmark, loaded: Any) -> list[Any]:
    """The benchmark's tasks; while a store keeps features of the model, those of the last benchmarks are kept too.

    An evaluation leaves its questions on a task: everyone gets copies. A judged task is bound to its judge.
    """
    model = getattr(loaded, "model", None)
    store = None if model is None or benchmark.judge else shared(model)
    if store is None:
        return build_tasks(benchmark)
    name = repr(benchmark)
    if name not in store.tasks:
        store.tasks[name] = build_tasks(benchmark)
        while len(store.tasks) > BUILT:
            store.tasks.popitem(last=False)
    return [copy.copy(task) for task in store.tasks[name]]


def _answering(error: BaseException) -> bool:
    """Whether it was raised while answers were made, which is no matter of the rows."""
    from pruneval.harness.lmms_model import PrunevalModel

    answering = PrunevalModel.generate_until.__code__
    return any(frame.f_code is answering for frame, _ in traceback.walk_tb(error.__traceback__))


def preview(benchmark: Benchmark, loaded: Any, limit: int | None = None) -> list[str]:
    """The exact prompts the model would get for the first `limit` questions."""
    with quiet(), judging(benchmark, None):
        from pruneval.harness.lmms_model import PrunevalModel

        lm = PrunevalModel(loaded)
        return lm.prompts(instances_of(benchmark, limit, lm))


def instances_of(benchmark: Benchmark, count: int | None, lm: Any) -> list[Any]:
    """lmms-eval's requests of the first questions of every part; `lm` knows the data afterwards."""
    with quiet(), judging(benchmark, None):
        found: list[Any] = []
        for task in build_tasks(benchmark):
            lm.task_dict[task.config.task] = task.dataset
            task.build_all_requests(limit=count)
            found += task.instances
        return found


def build_task(benchmark: Benchmark) -> Any:
    """The first of `build_tasks`: the only one, unless the benchmark has parts."""
    with quiet(), judging(benchmark, None):
        return build_tasks(benchmark)[0]
