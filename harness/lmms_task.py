"""lmms-eval's tasks as installed, with our data under them and the places mended where they score wrongly.

lmms-eval takes 10 to 20 seconds to import, so it is imported inside the functions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pruneval.harness import data, guards
from pruneval.harness.errors import SampleFailure, UserError
from pruneval.tasks import Benchmark

PROMPT_KEY = "pruneval"
"""The model name tasks see: none of them knows it, so every task uses its default prompt."""
OWN = Path(__file__).resolve().parent.parent / "tasks" / "video_qa"
"""Task files of ours, for benchmarks that lmms-eval does not have."""
VERSIONS = ("get_git_commit_hash", "get_git_branch_name", "get_lmms_eval_version_string")
"""What lmms-eval starts git for, several times an evaluation, to note a commit that nobody reads here."""


def build_tasks(benchmark: Benchmark) -> list[Any]:
    """lmms-eval's task, or one per part of the benchmark; only the data and what `guards` mends is ours.

    Raises:
        UserError: the data set is missing, could not be loaded, or has other rows than the task reads.
        SampleFailure: the first row's image is unreadable (lmms-eval reads it while building).
    """
    with quiet():
        from lmms_eval.api.task import ConfigurableMessagesTask
        from tenacity import RetryError

        tasks = []
        for place, name in enumerate(benchmark.tasks):
            config = _config(benchmark, place)
            try:
                tasks.append(ConfigurableMessagesTask(config=config, model_name=PROMPT_KEY))
            except RetryError as error:
                cause = error.last_attempt.exception()
                raise UserError(
                    f"benchmark {benchmark.name!r}: the data set {benchmark.dataset!r} could not be loaded "
                    f"({type(cause).__name__}: {' '.join(str(cause).split())[:200]}); `pruneval data check` tells more"
                ) from cause
            except UserError:
                raise
            except (OSError, SyntaxError, ValueError) as error:
                raise SampleFailure(f"{name}/0", f"{type(error).__name__}: {error}") from error
            except Exception as error:
                raise unreadable(benchmark, error) from error
        return tasks


def unreadable(benchmark: Benchmark, cause: BaseException) -> UserError:
    """The line for rows that lmms-eval's task cannot make questions of, or cannot score."""
    return UserError(
        f"benchmark {benchmark.name!r}: lmms-eval's task {benchmark.task!r} cannot read or score its rows "
        f"({type(cause).__name__}: {' '.join(str(cause).split())[:200]}); are they those of {benchmark.dataset!r}?"
    )


@functools.cache
def task_files() -> dict[str, Path]:
    """The YAML files by task, installed and ours. lmms-eval's own index parses 2,000 files, which takes seconds."""
    spec = importlib.util.find_spec("lmms_eval")  # importing it takes seconds
    assert spec is not None  # it is a dependency
    found: dict[str, Path] = {}
    for folder in (Path(str(spec.origin)).parent / "tasks", OWN):
        for path in sorted(folder.rglob("*.yaml")):
            text = path.read_text("utf-8")
            for name in re.findall(r"""^task:\s*["']?([\w.+-]+)["']?\s*(?:#.*)?$""", text, re.MULTILINE):
                found.setdefault(name, path)
    return found


def task_file(name: str) -> Path:
    """The YAML file of a task. Raises: UserError when there is none."""
    try:
        return task_files()[name]
    except KeyError:
        raise UserError(f"lmms-eval has no task {name!r}") from None


def whole_groups(task: Any, benchmark: Benchmark, limit: int | None) -> int | None:
    """The largest number of rows up to `limit` that cuts no group apart (at least one group).

    The rows of a group stand together: `_together` has seen to that.
    """
    if not limit or not benchmark.group:
        return limit or None
    keys = _keys(task.eval_docs_no_media, benchmark)
    ends = [index + 1 for index, key in enumerate(keys) if keys[index + 1 : index + 2] != [key]]
    return max((end for end in ends if end <= limit), default=ends[0])


def _config(benchmark: Benchmark, place: int) -> dict[str, Any]:
    from lmms_eval.utils import load_yaml_config

    name = benchmark.tasks[place]
    try:
        config = load_yaml_config(str(task_file(name)), mode="full")
    except ImportError as error:
        raise UserError(f"benchmark {benchmark.name!r} needs the package {error.name!r}: pip install it") from error
    source = data.source(benchmark, place)
    config["dataset_path"], config["dataset_name"] = source.builder, None
    config["dataset_kwargs"] = {"data_files": {benchmark.split: source.files}, **source.cache}
    steps = [_only, _together]
    if benchmark.images is not None:
        steps.insert(0, _join_images)
    if benchmark.answers and benchmark.edition == "full":
        steps.insert(0, _join_answers)
    own = config.get("process_docs") if benchmark.images is None else None
    config["process_docs"] = functools.partial(_processed, own=own, steps=steps, benchmark=benchmark)
    if benchmark.prompt:
        kwargs = dict(config.get("lmms_eval_specific_kwargs") or {})
        config["lmms_eval_specific_kwargs"] = {**kwargs, "default": {**kwargs.get("default", {}), **benchmark.prompt}}
    if benchmark.videos:
        config["doc_to_visual"] = functools.partial(
            data.video_of, benchmark=benchmark, place=place, folder=data.video_folder(benchmark)
        )
    guards.mend(config, benchmark)
    return config


def _processed(questions: Any, *, own: Callable | None, steps: list[Callable], benchmark: Benchmark) -> Any:
    if own is not None:
        questions = own(questions)
    for step in steps:
        questions = step(questions, benchmark)
    return questions


def _only(questions: Any, benchmark: Benchmark) -> Any:
    """The questions that count towards the benchmark."""
    for column, values in benchmark.only.items():
        questions = questions.select([i for i, value in enumerate(questions[column]) if value in values])
    return questions


def _together(questions: Any, benchmark: Benchmark) -> Any:
    """Rows that are scored together one after another, groups in the order of their first rows."""
    if not benchmark.group:
        return questions
    keys = _keys(questions, benchmark)
    first: dict[Any, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    order = sorted(range(len(keys)), key=lambda index: first[keys[index]])
    return questions if order == list(range(len(keys))) else questions.select(order)


def _keys(questions: Any, benchmark: Benchmark) -> list[Any]:
    values = zip(*(questions[column] for column in benchmark.group), strict=True)
    return [value[0] % benchmark.rotation if benchmark.rotation else value for value in values]


def _join_images(questions: Any, benchmark: Benchmark) -> Any:
    """Give each question its image out of the benchmark's image table, without decoding any.

    lmms-eval's own GQA join loads the table by a fixed name, so it cannot be pointed elsewhere, and encodes every image
    again in eight processes.
    """
    import datasets

    assert benchmark.images is not None
    _, key, identity = benchmark.images
    source = data.image_table(benchmark)
    images = datasets.load_dataset(source.builder, data_files={"images": source.files}, split="images", **source.cache)
    position = {value: index for index, value in enumerate(images[identity])}
    picked = images.select([position[value] for value in questions[key]]).select_columns(["image"])
    return datasets.concatenate_datasets([questions, picked.flatten_indices()], axis=1)


def _join_answers(questions: Any, benchmark: Benchmark) -> Any:
    """Give each question its answer: by `question_id` where answers have one, else by position."""
    rows = data.answers(benchmark)
    if len(rows) != len(questions):
        raise UserError(f"benchmark {benchmark.name!r}: {len(questions)} questions and {len(rows)} answers")
    if all("question_id" in row for row in rows):
        known = {str(row["question_id"]): row["answer"] for row in rows}
        try:
            found = [known[str(identity)] for identity in questions["question_id"]]
        except KeyError as error:
            raise UserError(f"benchmark {benchmark.name!r}: question {error} has no answer") from None
    else:
        found = [row["answer"] for row in rows]
    return questions.add_column("answer", [str(answer) for answer in found])


def _hidden(bar: Callable, *args: Any, **options: Any) -> Any:
    return bar(*args, **{**options, "disable": True})


_quiet: list[None] = []
"""One for every `quiet` block that is open: they may be nested."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lmms-eval without its printing, log lines and progress bars, and without what importing it does to the process.

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
    asking = {name: getattr(evaluator_module, name) for name in VERSIONS}
    for name in VERSIONS:
        setattr(evaluator_module, name, str)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    _quiet.append(None)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar
        for name, function in asking.items():
            setattr(evaluator_module, name, function)
        if bars_shown:
            datasets.enable_progress_bars()
        _quiet.pop()
        if not _quiet:  # the outermost one
            logger.enable("lmms_eval")
