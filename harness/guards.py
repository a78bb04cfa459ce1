"""Where lmms-eval 0.7.3 would score wrongly without saying so: mended in a task's configuration, or refused afterwards.

Nothing here changes a prompt, or the score of a task that works.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pruneval.harness.errors import UserError
from pruneval.harness.judge import ask, marked
from pruneval.tasks import Benchmark

WITHOUT_MEANING = ("pope_yes_ratio",)
"""Metrics that say something else than their name: POPE's share of yes is counted on the right answers."""


def mend(config: dict[str, Any], benchmark: Benchmark) -> None:
    """Change a task's configuration in place where its scoring is broken."""
    mending = _MENDED.get(benchmark.task.removesuffix("{part}"))
    if mending is not None:
        mending(config, benchmark)


def refuse(benchmark: Benchmark, logged: list[dict[str, Any]]) -> None:
    """Raise a UserError when rows were not scored but would count all the same.

    Args:
        logged: lmms-eval's samples, with each metric's value of the row.
    """
    if benchmark.task == "llava_in_the_wild":
        # A row the judge did not answer has the scores (-1, -1); if all have, the metric is 100.
        unjudged = [one["doc_id"] for one in logged if min(one["gpt_eval_llava_all"]["scores"]) < 0]
        if unjudged:
            raise UserError(
                f"benchmark {benchmark.name!r}: the judge gave no two scores for {len(unjudged)} of {len(logged)} "
                f"questions (first: {benchmark.task}/{unjudged[0]}); nothing is scored"
            )


def _metric(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(metric for metric in config["metric_list"] if metric["metric"] == name)


def _mathvista(config: dict[str, Any], benchmark: Benchmark) -> None:
    """`precision` is a float, by which nothing can be rounded, so that every float answer is wrong; no right answer at
    all gives None instead of 0.
    """
    score, aggregate = config["process_results"], _metric(config, "llm_as_judge_eval")["aggregation"]

    def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        precision = doc["precision"]
        return score({**doc, "precision": None if precision is None else int(precision)}, results)

    def aggregation(results: list[dict[str, Any]], args: Any) -> float:
        # The original takes "metadata" out of the values it is given.
        return aggregate([dict(result) for result in results], args) or 0.0

    config["process_results"] = process_results
    for metric in config["metric_list"]:
        if metric["metric"] == "llm_as_judge_eval":
            metric["aggregation"] = aggregation
    config["metric_list"] = [metric for metric in config["metric_list"] if metric["metric"] != "submission"]


def _hallusionbench(config: dict[str, Any], benchmark: Benchmark) -> None:
    """Without a judge the package's own rules apply, which its configuration has commented out."""
    if benchmark.judge:
        return
    functions = config["process_results"].__globals__
    for metric in config["metric_list"]:
        metric["aggregation"] = functools.partial(
            _copies, functions[f"hb_aggregation_result_{metric['metric']}_intern"]
        )


def _copies(aggregate: Callable, results: list[dict[str, Any]]) -> float:
    return aggregate([dict(result) for result in results])


def _mmbench(config: dict[str, Any], benchmark: Benchmark) -> None:
    """An unreadable answer would be sent to a judge and, without one, become a random option after 45 seconds: the
    package's own rules read it instead. Every row also says whether it is right by itself.
    """
    import pandas as pd

    score = config["process_results"]
    evaluator = score.__globals__["mmbench_evaluator"]

    def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        values = score(doc, results)
        row = values["gpt_eval_score"]
        alone = pd.DataFrame([{**row, "prediction": str(row["prediction"])}])
        row["score"] = float(evaluator.eval_sub_data(alone, {doc["index"]: doc["answer"]}, static_only=True))
        return {"gpt_eval_score": row}

    def aggregation(results: list[dict[str, Any]]) -> float:
        return 100 * float(evaluator.eval_result(results, eval_method="static")[0])

    config["process_results"] = process_results
    config["metric_list"] = [{"metric": "gpt_eval_score", "aggregation": aggregation, "higher_is_better": True}]


def _mmvet(config: dict[str, Any], benchmark: Benchmark) -> None:
    """A reply of the judge that is no mark would become 0, and one above 1 would be asked about for ever."""
    functions = config["process_results"].__globals__
    functions["get_chat_response"] = marked(functions["get_chat_response"])


def _mvbench(config: dict[str, Any], benchmark: Benchmark) -> None:
    """Empty answers would be left out of the denominator: they are wrong."""
    metric = _metric(config, "mvbench_accuracy")
    aggregate = metric["aggregation"]

    def aggregation(results: list[dict[str, Any]]) -> float:
        return aggregate([{**result, "pred_answer": result["pred_answer"] or "(empty)"} for result in results])

    metric["aggregation"] = aggregation


def _video_qa(config: dict[str, Any], benchmark: Benchmark) -> None:
    """Not a repair: our own tasks are told whom to ask."""
    if benchmark.judge:
        config["process_results"].__globals__["ask_judge"] = ask


_MENDED: dict[str, Callable[[dict[str, Any], Benchmark], None]] = {
    "mathvista_testmini_cot": _mathvista,
    "hallusion_bench_image": _hallusionbench,
    "mmbench_en_dev_static": _mmbench,
    "mmbench_cn_dev": _mmbench,
    "mmvet": _mmvet,
    "mvbench_": _mvbench,
    "tgif_qa": _video_qa,
    "msvd_qa": _video_qa,
    "msrvtt_qa": _video_qa,
}
