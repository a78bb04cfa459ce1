"""One model, one method, one benchmark: scores and per-sample rows, through lmms-eval's own task, prompts and metrics.

lmms-eval takes 10 to 20 seconds to import, so it is imported inside the functions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneval.harness.errors import SampleFailure, UserError
from pruneval.harness.outcome import Outcome, samples_of, scores_of
from pruneval.tasks import Benchmark

if TYPE_CHECKING:
    from pruneval.harness.lmms_model import Journal

PROMPT_KEY = "pruneval"
"""The model name tasks see: none of them knows it, so every task uses its default prompt."""


def evaluate(
    loaded: Any,
    method: Any,
    benchmark: Benchmark,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    num_beams: int | None = None,
    journal: Journal | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Run a benchmark and score it.

    Args:
        loaded: a `LoadedModel`.
        method: a `Method`, or None for the bare model.
        limit: the first so many questions; rows that are scored together (MME's pairs) stay together.
        batch_size: samples per `generate`.
        num_beams: beams of the search, or None for what the task says.
        journal: where answers go after every batch; answers already there are not generated again.
        on_progress: called as (done, total).

    Raises:
        UserError: the data cannot be loaded, or the limit leaves nothing to score.
        SampleFailure: a question could not be answered; nothing is scored.
    """
    task = build_task(benchmark)
    with _quiet():
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
        from tenacity import RetryError

        from pruneval.harness.lmms_model import PrunevalModel

        lm = PrunevalModel(
            loaded, method, batch_size, seed, num_beams=num_beams, journal=journal, on_progress=on_progress
        )
        with tempfile.TemporaryDirectory(prefix="pruneval-") as folder:
            try:
                results = simple_evaluate(
                    model=lm,
                    tasks=[task],
                    task_manager=TaskManager(include_defaults=False),  # the task is built already
                    num_fewshot=0,
                    limit=_whole_groups(task, benchmark, limit),
                    bootstrap_iters=0,
                    log_samples=True,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    # Submission files go to the folder; pictures are not decoded again for scoring.
                    cli_args=Namespace(output_path=folder, process_with_media=False),
                    process_docs_parallel=1,
                )
            except RetryError as error:
                cause = error.last_attempt.exception()
                raise RuntimeError(f"scoring {benchmark.name} failed: {type(cause).__name__}: {cause}") from cause
    logged = sorted(results["samples"][benchmark.task], key=lambda sample: sample["doc_id"])
    scores = scores_of(results["results"][benchmark.task], logged, task.aggregation(), benchmark)
    return Outcome(scores, samples_of(logged, lm.rows, benchmark))


def preview(benchmark: Benchmark, loaded: Any, limit: int | None = None) -> list[str]:
    """The exact prompts the model would get for the first `limit` questions."""
    task = build_task(benchmark)
    with _quiet():
        from pruneval.harness.lmms_model import PrunevalModel

        lm = PrunevalModel(loaded)
        lm.task_dict[benchmark.task] = task.dataset
        task.build_all_requests(limit=limit)
        return lm.prompts(task.instances)


def build_task(benchmark: Benchmark) -> Any:
    """lmms-eval's task as installed; for a pocket edition only the data is another.

    Raises:
        UserError: the data set could not be loaded.
        SampleFailure: the first row's image is unreadable (lmms-eval reads it while building).
    """
    with _quiet():
        from lmms_eval.api.task import ConfigurableMessagesTask
        from tenacity import RetryError

        config = _task_config(benchmark.task)
        if benchmark.edition == "pocket":
            from pruneval.tasks.pocket import editions

            folder = editions.ensure(benchmark.dataset)
            config["dataset_path"], config["dataset_name"] = "parquet", None
            config["dataset_kwargs"] = {
                "data_files": {benchmark.split: str(folder / f"{benchmark.split}.parquet")},
                "cache_dir": str(folder / "arrow"),
            }
            images: dict[str, Any] = {
                "path": "parquet",
                "data_files": {benchmark.split: str(folder / "images.parquet")},
                "cache_dir": str(folder / "arrow"),
            }
        else:
            config["dataset_path"] = benchmark.dataset
            # The installed files insist on a stored login; these data sets are public.
            config["dataset_kwargs"] = {k: v for k, v in (config.get("dataset_kwargs") or {}).items() if k != "token"}
            if benchmark.revision:
                config["dataset_kwargs"]["revision"] = benchmark.revision
            images = {"path": benchmark.dataset, "revision": benchmark.revision or None}
        if benchmark.images:
            config["process_docs"] = functools.partial(_join_images, benchmark=benchmark, source=images)
        try:
            return ConfigurableMessagesTask(config=config, model_name=PROMPT_KEY)
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise UserError(
                f"benchmark {benchmark.name!r}: the data set {benchmark.dataset!r} could not be loaded "
                f"({type(cause).__name__}: {' '.join(str(cause).split())[:200]}); connect to the hub once, or point "
                "HF_HOME at a cache that holds it; the pocket editions need no download"
            ) from cause
        except (OSError, SyntaxError, ValueError) as error:
            raise SampleFailure(f"{benchmark.task}/0", f"{type(error).__name__}: {error}") from error


@functools.cache
def _task_files() -> dict[str, Path]:
    """The installed YAML files by task. lmms-eval's own index parses 2,000 files first, which takes seconds."""
    spec = importlib.util.find_spec("lmms_eval")  # importing it takes seconds
    found: dict[str, Path] = {}
    for path in sorted((Path(str(spec.origin)).parent / "tasks").rglob("*.yaml")):
        for name in re.findall(r"""^task:\s*["']?([\w.+-]+)["']?\s*(?:#.*)?$""", path.read_text("utf-8"), re.MULTILINE):
            found.setdefault(name, path)
    return found


def _task_file(name: str) -> Path:
    """The installed YAML file of a task. Raises: UserError when there is none."""
    try:
        return _task_files()[name]
    except KeyError:
        raise UserError(f"lmms-eval has no task {name!r}") from None


def _task_config(name: str) -> dict[str, Any]:
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(str(_task_file(name)), mode="full")


def _join_images(questions: Any, *, benchmark: Benchmark, source: dict[str, Any]) -> Any:
    """Give each question its image out of the benchmark's image table, without decoding any.

    lmms-eval's own GQA join loads the table by a fixed name, so it cannot be pointed elsewhere, and encodes every image
    again in eight processes.
    """
    import datasets

    table, key, identity = benchmark.images
    name = None if source["path"] == "parquet" else table
    images = datasets.load_dataset(name=name, split=benchmark.split, **source)
    position = {value: index for index, value in enumerate(images[identity])}
    picked = images.select([position[value] for value in questions[key]]).select_columns(["image"])
    return datasets.concatenate_datasets([questions, picked.flatten_indices()], axis=1)


def _whole_groups(task: Any, benchmark: Benchmark, limit: int | None) -> int | None:
    """The largest number of rows up to `limit` that cuts no group apart (at least one group)."""
    if not limit or not benchmark.group:
        return limit or None
    (column,) = benchmark.group
    ids = task.eval_docs_no_media[column]
    last = {value: index for index, value in enumerate(ids)}
    best = end = 0
    for index, value in enumerate(ids):
        end = max(end, last[value])
        if end == index:
            if index + 1 > limit and best:
                break
            best = index + 1
            if best >= limit:
                break
    return best


def _hidden(bar: Callable, *args: Any, **options: Any) -> Any:
    return bar(*args, **{**options, "disable": True})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lmms-eval without its log lines and progress bars, and without what importing it does to the process.

    Importing it silences all warnings, and makes a truncated image count as one whose missing part is grey: here it is
    an error, so that no question is scored on a picture that is not there.
    """
    from loguru import logger
    from PIL import ImageFile

    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    logger.disable("lmms_eval")
    with warnings.catch_warnings():
        import datasets
        import lmms_eval.api.task as task_module
        import lmms_eval.evaluator as evaluator_module
    bars_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    modules = (task_module, evaluator_module)
    bars = [module.tqdm for module in modules]
    for module, bar in zip(modules, bars, strict=True):
        module.tqdm = functools.partial(_hidden, bar)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
        if bars_shown:
            datasets.enable_progress_bars()
        logger.enable("lmms_eval")
