"""The language model that scores some benchmarks: any endpoint that speaks OpenAI's protocol, by configuration.

`PRUNEVAL_JUDGE_URL` (the base, such as http://localhost:8000/v1), `PRUNEVAL_JUDGE_MODEL`, and `PRUNEVAL_JUDGE_KEY`
where the endpoint wants one. lmms-eval's judge layer swallows a dead or silent judge and scores the row as wrong, or as
right; here that ends the cell, with one line. The key is never written: not in records, log lines or tracebacks.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pruneval.harness.errors import UserError
from pruneval.tasks import Benchmark

TRIES = 3
PAUSE = 1.0
"""Seconds before the second try; doubled before the third."""
URL, MODEL, KEY = "PRUNEVAL_JUDGE_URL", "PRUNEVAL_JUDGE_MODEL", "PRUNEVAL_JUDGE_KEY"
VERDICTS = ("correct", "unclear")
"""What HallusionBench's judge says ("incorrect" holds the first)."""


class JudgeFailure(BaseException):
    """The judge gave no usable answer. Not an Exception: the tasks catch those and go on with a made-up score."""


@dataclass(frozen=True)
class Judge:
    """An endpoint and the model asked there."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """What a record says: the model and the host, never the key (nor one hidden in the address)."""
        return f"{self.model}@{urlsplit(self.url).hostname}"

    def hide(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self.key, "***") if self.key else text


def configured() -> Judge | None:
    """The judge of the environment, or None. Raises: UserError when only half of it is there."""
    url, model = os.environ.get(URL, ""), os.environ.get(MODEL, "")
    if not url and not model:
        return None
    if not url or not model:
        raise UserError(f"a judge needs both {URL} and {MODEL}; {URL if model else MODEL} is not set")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise UserError(f"{URL} must be the base address of an endpoint, as http://localhost:8000/v1")
    return Judge(url.rstrip("/"), model, os.environ.get(KEY, ""))


def lacking(benchmark: Benchmark) -> str | None:
    """Why the benchmark cannot be scored, or None."""
    if not benchmark.judge or configured() is not None:
        return None
    return f"{benchmark.name} is scored by a language model and none is configured; set {URL} and {MODEL} (and {KEY})"


@contextlib.contextmanager
def judging(benchmark: Benchmark, judge: Judge | None) -> Iterator[None]:
    """Build and score a judged benchmark's tasks inside; others are left alone.

    The tasks read the environment while they are imported, so building them belongs inside.

    Raises:
        UserError: the judge failed.
    """
    if not benchmark.judge:
        yield
        return
    from lmms_eval.llm_judge.providers.openai import OpenAIProvider
    from lmms_eval.tasks.hallusion_bench import utils as hallusion

    settings = {
        "API_TYPE": "openai",
        "OPENAI_API_KEY": (judge and judge.key) or "none",
        "OPENAI_API_URL": judge.url if judge else "http://127.0.0.1:9/v1",
        "MODEL_VERSION": judge.model if judge else "none",
    }
    before = {name: os.environ.get(name) for name in settings}
    real, requests = OpenAIProvider.evaluate, hallusion.requests

    def evaluate(self: Any, request: Any) -> Any:
        config = request.config or self.config
        config.num_retries = 1
        _address(self, config, judge)
        return _insist(judge, lambda: real(self, request), lambda answer: bool(answer.content.strip()))

    os.environ.update(settings)
    OpenAIProvider.evaluate = evaluate
    hallusion.requests = _Post(judge, requests)
    try:
        yield
    except JudgeFailure as failure:
        raise UserError(f"benchmark {benchmark.name!r}: {failure}; nothing is scored") from None
    finally:
        OpenAIProvider.evaluate, hallusion.requests = real, requests
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _address(provider: Any, config: Any, judge: Judge | None) -> None:
    """Turns a provider to this judge: some tasks make theirs when they are imported, with what was set then."""
    if judge is None:
        return
    config.model_name = judge.model
    if (provider.base_url, provider.api_key) != (judge.url, judge.key or "none"):
        from openai import OpenAI

        provider.base_url, provider.api_key = judge.url, judge.key or "none"
        provider.client = OpenAI(api_key=provider.api_key, base_url=provider.base_url)


class _Post:
    """Stands in for `requests` where HallusionBench posts by itself, to an address it read when it was imported."""

    def __init__(self, judge: Judge | None, requests: Any) -> None:
        self._judge, self._requests = judge, requests

    def post(self, url: str, headers: Any, json: dict[str, Any], timeout: float) -> Any:
        judge = self._judge

        def ask() -> Any:
            assert judge is not None
            response = self._requests.post(
                f"{judge.url}/chat/completions",
                headers={"Authorization": f"Bearer {judge.key or 'none'}", "Content-Type": "application/json"},
                json={**json, "model": judge.model},
                timeout=timeout,
            )
            response.raise_for_status()
            return response

        def readable(response: Any) -> bool:
            text = response.json()["choices"][0]["message"]["content"].lower()
            return any(verdict in text for verdict in VERDICTS)

        return _insist(judge, ask, readable)


def _insist(judge: Judge | None, ask: Callable[[], Any], readable: Callable[[Any], bool]) -> Any:
    """A readable answer within `TRIES`, or a JudgeFailure that says what the last one was."""
    if judge is None:
        raise JudgeFailure("no judge is configured")
    reason = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        try:
            answer = ask()
            if readable(answer):
                return answer
            reason = "an answer that cannot be read"
        except Exception as error:
            # The original may carry the key in its text or its request.
            reason = judge.hide(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise JudgeFailure(f"the judge {judge.name} gave {TRIES} times no usable answer ({reason})")


def marked(ask: Callable[..., tuple[str, str]]) -> Callable[..., tuple[str, str]]:
    """MM-Vet's question to its judge, asked again until the reply starts with a mark from 0 to 1.

    The original goes on for ever after a mark above 1, and takes eight words for 0.
    """

    def asked(prompt: str, **options: Any) -> tuple[str, str]:
        for _ in range(TRIES):
            content, model = ask(prompt, **options)
            with contextlib.suppress(ValueError):
                if 0 <= float(content.split(" ")[0].strip()) <= 1:
                    return content, model
        raise JudgeFailure(f"the judge gave {TRIES} times no mark from 0 to 1 (the last: {content[:40]!r})")

    return asked


def ask(messages: list[dict[str, str]], readable: Callable[[str], bool]) -> str:
    """The judge's reply to messages, through lmms-eval's judge layer; inside `judging` only.

    Raises:
        JudgeFailure: no readable reply.
    """
    from lmms_eval.llm_judge import Request, ServerConfig, get_server

    config = ServerConfig(model_name=os.environ["MODEL_VERSION"], temperature=0.0, max_tokens=64)
    server = get_server(server_name="openai", config=config)
    for _ in range(TRIES):
        content = str(server.evaluate(Request(messages=messages, config=config)).content)
        if readable(content):
            return content
    raise JudgeFailure(f"the judge gave {TRIES} times no verdict that can be read (the last: {content[:40]!r})")
