"""lmms-eval's view of a pruned model: requests in, answers out, batched, resumable, no answer that was not generated.

Used by `harness/evaluate.py`, and by lmms-eval's own command line through the entry point `pruneval`:

    python -m lmms_eval --model pruneval --model_args pretrained=<path>,method=fastv,keep=0.5 --tasks pope
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from pruneval.harness import batching, interrupt
from pruneval.harness.errors import SampleFailure, UserError
from pruneval.harness.generation import (
    MAX_NEW_TOKENS,
    budget_of,
    digest,
    generation_arguments,
    one_line,
    positive,
    settled,
)
from pruneval.harness.preparing import Prepared, Preparing, collate
from pruneval.harness.ranks import ALONE, Ranks
from pruneval.harness.reuse import serving, shared
from pruneval.harness.spec import FRAMES

WITHIN = 2**28
"""Bytes of image features kept within one evaluation."""


class Elsewhere(BaseException):
    """The answers are scored in another process. Not an Exception: lmms-eval's evaluator is left as it is."""


class Journal(Protocol):
    """Answers of an unfinished cell; `harness/records.py` has the one on disk."""

    def answers(self) -> Mapping[str, Mapping[str, Any]]: ...
    def append(self, rows: list[dict[str, Any]]) -> None: ...


@dataclass
class _Request:
    key: str
    """ "<task>/<doc id>": names the sample everywhere, and seeds its randomness."""
    doc_id: int
    context: str
    options: dict[str, Any]
    messages: Callable[[], list[dict]]
    """Builds the chat messages; this is where the row's images are decoded."""
    data: str
    """Names the table's content; empty where nothing does."""
    prepared: Prepared | None = None
    """What the model is given, while the request's turn is near."""

    @property
    def digest(self) -> str:
        """What the answer in a journal must have been an answer to."""
        return digest(self.context + json.dumps(self.options, sort_keys=True, default=str))


def manifest() -> Any:
    """The registration payload of the entry point group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="pruneval", chat_class_path=f"{__name__}.PrunevalModel")


class PrunevalModel(lmms):
    """A model with a pruning method, as lmms-eval's chat model.

    Args:
        pretrained: a model's name or path (loaded here), or a `LoadedModel`.
        method: a method's name, a `Method`, or None for the bare model (no session, hence no budgets).
        batch_size: samples per `generate`, or "auto"; the answers do not depend on it.
        seed: of the session's randomness.
        device, dtype, kernel: used when `pretrained` is loaded here.
        max_new_tokens: for tasks that set none.
        num_beams: beams of the search; None leaves it to the task.
        frames: of each video, evenly spaced.
        journal: answers already there are not generated again; new ones are appended after every batch.
        on_progress: called as (done, total) after every batch.
        ranks: this process among those that share the questions.
        params: the method's parameters, when `method` is a name.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: Any,
        method: Any = None,
        batch_size: int | str = 8,
        seed: int = 0,
        device: str | None = None,
        dtype: str | None = None,
        kernel: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        num_beams: int | None = None,
        frames: int | str = FRAMES,
        max_batch_size: int | None = None,
        journal: Journal | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        ranks: Ranks = ALONE,
        **params: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            from pruneval.harness import models

            pretrained = models.load(pretrained, device=device, dtype=dtype, kernel=kernel)
        if isinstance(method, str):
            from pruneval import methods

            method = methods.build(method, params)
        elif params:
            raise UserError(f"parameters {sorted(params)} were given, but no method's name")
        self.loaded = pretrained
        self.method = method
        self.batch_size = batching.size_of(batch_size)
        self.seed = int(seed)
        self.max_new_tokens = int(max_new_tokens)
        self.num_beams = int(num_beams) if num_beams else None
        self.frames = positive(frames, "the number of frames")
        self.journal, self.ranks = journal, ranks
        self.on_progress = on_progress or (lambda done, total: None)
        self.halved: int | None = None
        """The largest batch since one did not fit into memory."""
        self.preparing = Preparing(self.loaded, self.frames, self._chat)
        self.automatic = batching.Automatic(getattr(self.loaded, "device", torch.device("cpu")))
        self.rows: dict[str, dict[str, Any]] = {}
        """What happened to each request, by key."""

    # lmms-eval's contract ---------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer per request, in order.

        Raises:
            SampleFailure: for the first request that cannot be answered.
            Elsewhere: in any but the first of several processes, when all have answered their part.
        """
        asked = [self._request(instance) for instance in requests]
        known = self.ranks.once(lambda: self.journal.answers() if self.journal is not None else {}, "journal")
        for request in asked:
            row = known.get(request.key)
            if row is not None and row.get("request") == request.digest:
                self.rows[request.key] = dict(row)
        waiting = [request for request in asked if request.key not in self.rows]
        self.on_progress(len(self.rows), len(asked))
        mine = self.ranks.share(sorted(waiting, key=lambda request: -len(request.context)))
        self.ranks.agree(lambda: self._work(mine, len(asked)), "answers")
        for rows in self.ranks.all({request.key: self.rows[request.key] for request in mine}, "rows"):
            self.rows.update(rows)
        if not self.ranks.first:
            raise Elsewhere
        if self.ranks.count > 1:
            self.on_progress(len(asked), len(asked))
        return [self.rows[request.key]["answer"] for request in asked]

    def _work(self, waiting: list[_Request], total: int) -> None:
        """Answers requests; of several processes all go about equally fast, so one speaks for all."""
        if not waiting:
            return
        left = len(waiting)
        most = total if self.ranks.count == 1 else total - 1  # the others may not be done
        with ExitStack() as stack:
            stack.enter_context(self._sharing())
            session = stack.enter_context(self._session())
            for batch in self._batches(waiting):
                rows = self._answer(batch, session)
                self.rows.update((row["key"], row) for row in rows)
                if self.journal is not None:
                    self.journal.append(rows)
                left -= len(batch)
                self.on_progress(min(most, max(0, total - left * self.ranks.count)), total)
                interrupt.obey()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UserError("this task scores likelihoods; pruneval evaluates generated answers only")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("this task talks in several rounds; pruneval evaluates single answers only")

    def clean(self) -> None:
        """Nothing to free: the model outlives the task, and no module is an attribute of this object."""

    # The steps --------------------------------------------------------------------------------------------------------

    @property
    def batched(self) -> int | None:
        """The largest batch there was room for, where that was found out here and not said."""
        return self.halved or (self.automatic.largest if self.batch_size == batching.AUTO else None)

    def prompts(self, requests: list[Instance]) -> list[str]:
        """The exact text the processor gets for each request."""
        return [self._chat(self._request(instance))[0] for instance in requests]

    def ask(self, instance: Instance, session: Any) -> dict[str, Any]:
        """The row of one question, asked by itself within a session."""
        return self._generate([self._request(instance)], session)[0]

    def pictures(self, instance: Instance) -> list[Any]:
        """The images of one question, as they come."""
        return self._chat(self._request(instance))[1]

    def _batches(self, waiting: list[_Request]) -> Iterator[list[_Request]]:
        """Requests that go together, prepared; the next batch is chosen when the one before has been answered."""
        for window in batching.windows(waiting, self.batch_size):
            self.preparing.ready(window)
            for batch in batching.batches(window, self.preparing.measure, self._size):
                yield batch
                self.automatic.saw(sum(self.preparing.measure(request)[1] for request in batch))
                for request in batch:
                    request.prepared = None

    def _size(self, tokens: int) -> int:
        found = self.automatic.size(tokens) if self.batch_size == batching.AUTO else self.batch_size
        return min(found, self.halved or found)

    def _chat(self, request: _Request) -> tuple[str, list[Any], list[str]]:
        """The chat text, and images and videos in the order of their placeholders."""
        from lmms_eval.protocol import ChatMessages

        chat = ChatMessages(messages=request.messages())
        images, paths, sounds = chat.extract_media()
        if sounds:
            raise UserError(f"sample {request.key} holds sound; only images and videos are supported")
        messages = chat.model_dump()["messages"]
        text = self.loaded.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, images, paths

    def _request(self, instance: Instance) -> _Request:
        context, build, options, doc_id, task, split = instance.args
        rows = self.task_dict[task][split]
        data = getattr(rows, "_fingerprint", "")  # which files `datasets` has them from
        return _Request(f"{task}/{doc_id}", doc_id, context, options, lambda: build(rows[doc_id]), data)

    def _sharing(self) -> Any:
        """Questions about one image share its features, unless a store that outlives this evaluation sees to it."""
        model = getattr(self.loaded, "model", None)
        return nullcontext() if model is None or shared(model) else serving(model, memory=WITHIN, disk=0)

    def _session(self) -> Any:
        if self.method is None:
            return nullcontext(None)
        from pruneval.harness.models import adapter_of
        from pruneval.harness.session import pruned

        adapter = adapter_of(self.loaded, self.method)
        return pruned(self.loaded.model, self.method, seed=self.seed, adapter=adapter)

    def _answer(self, batch: list[_Request], session: Any) -> list[dict[str, Any]]:
        """Rows of a batch. One that does not fit into memory is halved; one that fails is tried sample by sample, to
        find out which it is.
        """
        if self.halved is not None and len(batch) > self.halved:
            parts = [batch[start : start + self.halved] for start in range(0, len(batch), self.halved)]
            return [row for part in parts for row in self._answer(part, session)]
        try:
            return self._generate(batch, session)
        except UserError:
            raise
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise SampleFailure(batch[0].key, "out of memory, even alone") from error
            self.halved = len(batch) // 2
            warnings.warn(f"a batch of {len(batch)} does not fit into memory: on with {self.halved}", stacklevel=2)
        except Exception as error:
            if len(batch) == 1:
                raise SampleFailure(batch[0].key, one_line(error)) from error
            reason = one_line(error)
            rows = [row for request in batch for row in self._answer([request], session)]
            warnings.warn(f"a batch of {len(batch)} failed ({reason}): answered one by one", stacklevel=2)
            return rows
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._answer(batch, session)

    def _generate(self, batch: list[_Request], session: Any) -> list[dict[str, Any]]:
        prepared = [self.preparing.of(request) for request in batch]
        model, tokenizer = self.loaded.model, self.loaded.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        inputs = {
            name: part.to(self.loaded.device, model.dtype if part.is_floating_point() else part.dtype)
            for name, part in collate(prepared, pad).items()
        }
        if session is not None:
            session.sample_keys = [request.key for request in batch]
        arguments = generation_arguments(batch[0].options, self.max_new_tokens)
        arguments["num_beams"] = self.num_beams or arguments["num_beams"]
        if model.generation_config.eos_token_id is None:
            arguments["eos_token_id"] = tokenizer.eos_token_id
        with torch.inference_mode():
            output = model.generate(**inputs, **arguments, pad_token_id=pad)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        budgets = [budget_of(session, b) for b in range(len(batch))]
        answers, budgets = settled(session, answers, budgets)
        return [
            {
                "key": request.key,
                "doc_id": request.doc_id,
                "request": request.digest,
                "prompt": given.text,
                "prompt_hash": digest(given.text),
                "answer": answer,
                "image": given.picture,
                **budget,
            }
            for request, given, answer, budget in zip(batch, prepared, answers, budgets, strict=True)
        ]
