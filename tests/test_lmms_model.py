"""The wrapper answers as the plain model does, as lmms-eval's own wrapper does, and the same in batches."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny_llava
import torch
from PIL import Image

from pruneval import methods, tasks
from pruneval.harness import lmms_model, models
from pruneval.harness.errors import UserError
from pruneval.harness.evaluate import build_task, evaluate
from pruneval.harness.lmms_model import PrunevalModel, generation_arguments
from pruneval.tasks.pocket import editions, prompts


@pytest.fixture(scope="module")
def loaded() -> SimpleNamespace:
    return tiny_llava.loaded()


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return str(folder)


def requests(name: str, number: int) -> tuple:
    """lmms-eval's task and its first requests."""
    task = build_task(tasks.benchmark(name))
    task.build_all_requests(limit=number)
    return task, task.instances


@pytest.mark.parametrize("name", ["pocket-mme", "pocket-gqa", "pocket-scienceqa"])
def test_answers_are_those_of_plain_generate(name: str, loaded):
    row = tasks.benchmark(name)
    samples = evaluate(loaded, None, row, limit=8, batch_size=1).samples
    tables = editions.rows(row.dataset)
    pictures = {image["id"]: image["image"] for image in tables.get("images", [])}
    for sample, drawn in zip(samples.itertuples(), tables[row.split], strict=False):
        picture = Image.fromarray(drawn["image"] if "image" in drawn else pictures[drawn["imageId"]])
        inputs = loaded.processor(images=picture, text=sample.prompt, return_tensors="pt").to(dtype=torch.float64)
        output = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = loaded.processor.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert sample.answer == answer
    assert samples.answer.nunique() >= 6, "the model must tell the questions apart, or nothing is tested"


METHODS = [None, ("vanilla", {}), ("fastv", {"layer": 2, "keep": 0.5}), ("random", {"keep": 0.5})]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method[0] if method else "bare")
def test_answers_and_budgets_do_not_depend_on_the_batch(method, loaded):
    built = methods.build(*method) if method else None
    row = tasks.benchmark("pocket-scienceqa")
    alone = evaluate(loaded, built, row, limit=12, batch_size=1)
    together = evaluate(loaded, built, row, limit=12, batch_size=8)
    chosen = evaluate(loaded, built, row, limit=12, batch_size="auto")
    assert together.samples.equals(alone.samples) and chosen.samples.equals(alone.samples)
    assert together.scores == alone.scores == chosen.scores
    assert alone.batch_size is None and 1 < chosen.batch_size <= 64
    if method:
        keep = {"vanilla": 1.0, "fastv": 0.75, "random": 0.5}[method[0]]
        assert (alone.samples.visual_tokens == 16).all()
        assert alone.samples.keep.tolist() == pytest.approx([keep] * 12)
        assert alone.samples.avg_in.tolist() == pytest.approx([16 * keep] * 12)


def test_vanilla_is_the_bare_model(loaded):
    row = tasks.benchmark("pocket-pope")
    bare = evaluate(loaded, None, row, limit=6, batch_size=6).samples
    vanilla = evaluate(loaded, methods.build("vanilla"), row, limit=6, batch_size=6).samples
    assert vanilla.answer.tolist() == bare.answer.tolist()


def test_answers_are_those_of_lmms_evals_own_wrapper(loaded, saved, monkeypatch: pytest.MonkeyPatch):
    # That wrapper imports a video reader that is not installed and not used for pictures.
    decord = ModuleType("decord")
    decord.VideoReader = decord.cpu = None
    monkeypatch.setitem(sys.modules, "decord", decord)
    from lmms_eval.models.chat.llava_hf import LlavaHf

    theirs = LlavaHf(pretrained=saved, device="cpu", device_map="cpu", batch_size=1)
    ours = PrunevalModel(loaded, batch_size=4)
    for name in ("pocket-pope", "pocket-gqa", "pocket-scienceqa"):
        task, instances = requests(name, 8)
        theirs.task_dict[task.config.task] = ours.task_dict[task.config.task] = task.dataset
        expected = [answer.text for answer in theirs.generate_until(instances)]
        assert ours.generate_until(instances) == expected
        assert len(set(expected)) >= 4


def test_rows_say_what_was_asked(loaded):
    task, instances = requests("pocket-gqa", 2)
    model = PrunevalModel(loaded)
    model.task_dict["gqa"] = task.dataset
    answers = model.generate_until(instances)
    row = model.rows["gqa/1"]
    assert row["answer"] == answers[1] and row["doc_id"] == 1
    assert row["prompt"] == prompts.chat(editions.rows("gqa")["testdev"][1]["question"] + prompts.SHORT)
    assert len(row["prompt_hash"]) == 16 != row["request"]
    assert model.prompts(instances)[1] == row["prompt"]


def test_only_arguments_of_generate_are_passed_on():
    assert generation_arguments({"until": ["\n\n"], "image_aspect_ratio": "pad", "temperature": 0, "top_p": 1.0}) == {
        "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1,
        "max_new_tokens": lmms_model.MAX_NEW_TOKENS,
    }  # fmt: skip
    sampled = generation_arguments({"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 5})
    assert sampled["do_sample"] and (sampled["temperature"], sampled["top_p"]) == (0.2, 0.9)
    assert sampled["max_new_tokens"] == 5


def test_bad_settings_are_one_clear_line(loaded):
    with pytest.raises(UserError, match="batch size must be auto or a whole number of at least 1, not 0"):
        PrunevalModel(loaded, batch_size=0)
    with pytest.raises(UserError, match="batch size must be auto or a whole number of at least 1, not 'many'"):
        PrunevalModel(loaded, batch_size="many")
    with pytest.raises(UserError, match="no method's name"):
        PrunevalModel(loaded, keep=0.5)
    model = PrunevalModel(loaded)
    for call in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match="pruneval evaluates"):
            call([])


def test_the_model_survives_lmms_evals_cleaning(loaded):
    model = PrunevalModel(loaded)
    model.clean()
    assert model.loaded.model is loaded.model


def test_lmms_eval_runs_the_model_by_its_entry_point(saved):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager

    assert get_model("pruneval") is PrunevalModel
    row = tasks.benchmark("pocket-gqa")
    results = simple_evaluate(
        model="pruneval",
        model_args=f"pretrained={saved},method=fastv,layer=2,keep=0.5",
        tasks=[build_task(row)],
        task_manager=TaskManager(include_defaults=False),
        batch_size="4",
        device="cpu",
        limit=6,
    )
    answers = [sample["filtered_resps"][0] for sample in results["samples"]["gqa"]]
    loaded, method = models.load(saved, device="cpu"), methods.build("fastv", {"layer": 2, "keep": 0.5})
    assert answers == evaluate(loaded, method, row, limit=6).samples.answer.tolist()
    bare = evaluate(loaded, None, row, limit=6).samples.answer.tolist()
    assert answers != bare, "pruning must change something here"


def test_a_batch_that_does_not_fit_is_halved_and_so_are_those_after_it(monkeypatch):
    from pruneval.harness.lmms_model import PrunevalModel

    model, sizes = PrunevalModel.__new__(PrunevalModel), []
    model.halved = None

    def fits_three(batch, session):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(batch)

    monkeypatch.setattr(model, "_generate", fits_three)
    with pytest.warns(UserWarning, match="does not fit into memory"):
        assert model._answer(list(range(8)), None) == list(range(8))
    assert model._answer(list(range(4)), None) == list(range(4))
    assert (sizes, model.halved) == ([8, 4, 2, 2, 2, 2, 2, 2], 2)
