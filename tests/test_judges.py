"""Benchmarks scored by a language model: what they score, a judge that fails, and a key that is never written."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import scripting
from fakes import Evaluation, Silent, cells, load
from scripting import drawn

from pruneval import tasks
from pruneval.harness import judge, run
from pruneval.harness.errors import UserError
from pruneval.harness.evaluate import build_task

KEY = "sk-very-secret"


class Server:
    """An endpoint of OpenAI's form with scripted replies."""

    def __init__(self) -> None:
        self.reply: Callable[[str], str | int] = lambda prompt: "1.0"
        self.asked: list[tuple[str, str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                outer.asked.append((self.path, body["model"], self.headers["Authorization"]))
                reply = outer.reply(prompt)
                text = json.dumps(
                    {"error": {"message": f"no entry for {KEY}"}}
                    if isinstance(reply, int)
                    else {
                        "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                        "choices": [
                            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}
                        ],
                        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                    }
                ).encode()  # fmt: skip
                self.send_response(reply if isinstance(reply, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server()
    monkeypatch.setenv(judge.URL, found.url)
    monkeypatch.setenv(judge.MODEL, "scripted-1")
    monkeypatch.setenv(judge.KEY, KEY)
    monkeypatch.setattr(judge, "PAUSE", 0.0)
    yield found
    found.http.shutdown()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    return functools.partial(scripting.run, monkeypatch, batch_size=64)


def value(outcome, key: str) -> float:
    return outcome.scores[key]["value"]


def test_mmvet_is_the_mean_of_the_marks(server: Server, scripted):
    server.reply = lambda prompt: "0.5" if "| right |" in prompt else "0.0"
    outcome = scripted("pocket-mmvet", lambda row, i: "right" if i % 3 == 0 else "no", limit=12)
    assert value(outcome, "gpt_eval_score,none") == pytest.approx(100 * 0.5 * 4 / 12)
    assert list(outcome.samples.correct) == pytest.approx([0.5, 0, 0] * 4)
    assert {(path, model) for path, model, _ in server.asked} == {("/v1/chat/completions", "scripted-1")}
    assert server.asked[0][2] == f"Bearer {KEY}" and len(server.asked) == 12


@pytest.mark.parametrize("reply", ["good", "7", ""])
def test_a_reply_that_is_no_mark_ends_mmvet(reply: str, server: Server, scripted):
    server.reply = lambda prompt: reply
    with pytest.raises(UserError, match=r"'pocket-mmvet': the judge .*gave 3 times no .*nothing is scored"):
        scripted("pocket-mmvet", lambda row, i: "yes", limit=2)


def test_llava_bench_compares_two_scores(server: Server, scripted):
    server.reply = lambda prompt: "8 8\nfine" if "[Assistant 2]\ngood" in prompt else "8 4\nwell"
    # conv, detail, complex in turn: the first conversation is worth half.
    outcome = scripted("pocket-llava_bench", lambda row, i: "bad" if i == 0 else "good", limit=6)
    assert value(outcome, "gpt_eval_llava_conv,none") == pytest.approx(75.0)
    assert value(outcome, "gpt_eval_llava_detail,none") == pytest.approx(100.0)
    assert value(outcome, "gpt_eval_llava_all,none") == pytest.approx(91.7)
    assert list(outcome.samples.correct) == pytest.approx([0.5, 1, 1, 1, 1, 1])


def test_llava_bench_is_not_100_when_the_judge_says_nothing(server: Server, scripted):
    server.reply = lambda prompt: "I cannot tell"
    with pytest.raises(UserError, match="the judge gave no two scores for 3 of 3 questions"):
        scripted("pocket-llava_bench", lambda row, i: "good", limit=3)


def test_mathvista_scores_float_answers_and_nothing_right_is_0(server: Server, scripted):
    rows = drawn("mathvista")["testmini"]
    kinds = [row["answer_type"] for row in rows[:10]]
    assert kinds.count("float") == 4
    # Numbers and choices are read without the judge, lists by it.
    server.reply = lambda prompt: prompt.split("\n\n")[-2]
    gold = scripted("pocket-mathvista", lambda row, i: row["answer"], limit=10)
    assert value(gold, "llm_as_judge_eval,none") == pytest.approx(100.0)
    assert len(server.asked) == 2
    floats = scripted("pocket-mathvista", lambda row, i: row["answer"] if "." in row["answer"] else "?", limit=10)
    assert floats.samples.correct.sum() >= 4
    none = scripted("pocket-mathvista", lambda row, i: "99", limit=3)
    assert value(none, "llm_as_judge_eval,none") == 0.0


def test_a_judge_set_after_the_task_was_imported_is_the_one_asked(server: Server, scripted, monkeypatch):
    """MathVista makes its client when it is imported, with the address of that moment."""
    monkeypatch.setenv(judge.URL, "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="gave 3 times no usable answer"):
        scripted("pocket-mathvista", lambda row, i: str(row["answer"]), limit=10)
    monkeypatch.setenv(judge.URL, server.url)
    server.reply = lambda prompt: prompt.split("\n\n")[-2]
    scripted("pocket-mathvista", lambda row, i: str(row["answer"]), limit=10)
    assert {model for _, model, _ in server.asked} == {"scripted-1"}


def test_hallusionbench_asks_the_judge_anew_in_every_run(server: Server, scripted):
    server.reply = lambda prompt: "incorrect" if "Prediction answer:bad" in prompt else "correct"
    first = scripted("pocket-hallusionbench", lambda row, i: "bad" if i == 0 else "good", limit=8)
    assert [value(first, f"{key},none") for key in ("aAcc", "qAcc", "fAcc")] == [87.5, 75.0, 75.0]
    assert list(first.samples.correct) == [0.0] + [1.0] * 7
    asked = len(server.asked)
    second = scripted("pocket-hallusionbench", lambda row, i: "good", limit=8)
    assert value(second, "aAcc,none") == 100.0 and len(server.asked) == 2 * asked
    server.reply = lambda prompt: "who knows"
    with pytest.raises(UserError, match=r"no usable answer .an answer that cannot be read.; nothing is scored"):
        scripted("pocket-hallusionbench", lambda row, i: "good", limit=4)


def test_open_video_questions_are_judged_by_yes_and_score(server: Server, scripted):
    server.reply = lambda prompt: (
        "{'pred': 'yes', 'score': 4}" if "answer: good" in prompt else "{'pred': 'no', 'score': 1}"
    )
    outcome = scripted("pocket-tgif_qa", lambda row, i: "good" if i % 4 else "bad", limit=8)
    assert value(outcome, "gpt_eval_accuracy,none") == pytest.approx(0.75)
    assert value(outcome, "gpt_eval_score,none") == pytest.approx((6 * 4 + 2 * 1) / 8)
    server.reply = lambda prompt: "{'pred': 'maybe'}"
    with pytest.raises(UserError, match="no verdict that can be read"):
        scripted("pocket-tgif_qa", lambda row, i: "good", limit=1)


@pytest.mark.parametrize("name", ["pocket-mmvet", "pocket-llava_bench", "pocket-hallusionbench", "pocket-tgif_qa"])
def test_a_dead_judge_ends_the_cell_and_the_key_is_in_no_line(name: str, server: Server, scripted, capfd):
    server.reply = lambda prompt: 500
    with pytest.raises(UserError, match=f"{name}'.* nothing is scored") as failure:
        scripted(name, lambda row, i: "good", limit=2 if name != "pocket-hallusionbench" else 4)
    seen = [failure.value]
    while seen[-1].__cause__ or (seen[-1].__context__ and not seen[-1].__suppress_context__):
        seen.append(seen[-1].__cause__ or seen[-1].__context__)
    text = "".join(map(str, seen)) + "".join(capfd.readouterr())
    assert KEY not in text and "scripted-1@127.0.0.1" in str(failure.value)
    import os

    assert os.environ.get("OPENAI_API_KEY") != KEY


def test_without_a_judge_a_row_is_not_run_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path):
    for name in (judge.URL, judge.MODEL, judge.KEY):
        monkeypatch.delenv(name, raising=False)
    show = Silent()
    records, missed = run.run_cells(
        cells("pocket-mmvet", "pocket-gqa"), tmp_path, load, evaluate=Evaluation(4), show=show
    )
    assert [record.spec.benchmark for record in records] == ["pocket-gqa"] * 2
    assert len(missed) == 2 and "PRUNEVAL_JUDGE_URL" in missed[0].reason
    assert build_task(tasks.benchmark("pocket-mmvet")).config.task == "mmvet", "prompts can be seen without a judge"


def test_the_judge_is_part_of_what_a_record_is_about(server: Server):
    (spec, _), (plain, _) = ([cell.spec for cell in cells(name)] for name in ("pocket-mmvet", "pocket-gqa"))
    assert spec.judge == "scripted-1@127.0.0.1" and plain.judge == ""
    assert KEY not in json.dumps(spec.to_dict()) and KEY not in repr(judge.configured())
    assert type(spec).from_dict(spec.to_dict()) == spec
    old = {key: value for key, value in plain.to_dict().items() if key not in ("judge", "frames")}
    assert type(plain).from_dict(old).hash == plain.hash, "records from before there were judges are still found"


def test_half_a_judge_is_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(judge.URL, "http://localhost:1/v1")
    monkeypatch.delenv(judge.MODEL, raising=False)
    with pytest.raises(UserError, match="PRUNEVAL_JUDGE_MODEL is not set"):
        judge.configured()
    monkeypatch.setenv(judge.MODEL, "one")
    monkeypatch.setenv(judge.URL, "localhost")
    with pytest.raises(UserError, match="must be the base address"):
        judge.configured()
