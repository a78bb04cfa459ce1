"""Data-parallel within a cell: several processes, each with the model, share the questions of a benchmark.

`pruneval eval --processes 4` starts them here; `accelerate launch -m pruneval.harness.cli eval ...` may start them on
several machines that see one results folder. Every process goes through the same cells in step. What is done once
(claiming a cell, scoring it, writing its record) the first one does; each keeps a journal of its own answers. An error
of one is an error of all, so that none waits for another in vain; a process that dies ends all.

lmms-eval would divide the scoring too, where the failure of one process leaves the others waiting for ever. So it sees
one process: the questions are divided in `lmms_model.py`, and answers go to the first, which scores them all.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import pickle
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pruneval.harness.errors import UserError

T = TypeVar("T")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""What a launcher tells a process; taken away once read, as lmms-eval would divide the questions by them again."""
PATIENCE = timedelta(days=7)
"""How long a process waits for the slowest."""
PARTING = 30.0
"""Seconds that a process waits for its end when another one died."""


class OutOfStep(BaseException):
    """The processes do not do the same any more; nothing they exchange means anything."""


class Lost(BaseException):
    """Another process is gone; whoever started them all ends this one too."""


@dataclass(frozen=True)
class Ranks:
    """One of `count` processes that run the same cells.

    Attributes:
        number: which one, from 0; the first one scores and writes.
        count: how many there are.
        local: which one of this machine, hence its GPU.
    """

    number: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that does what is done once."""
        return self.number == 0

    def all(self, mine: T, step: str) -> list[T]:
        """Everybody's, in order. Every process calls it, for the same step. Raises: OutOfStep, Lost."""
        if self.count == 1:
            return [mine]
        from accelerate.utils import gather_object

        try:
            found = gather_object([(step, mine)])
        except RuntimeError as error:
            raise Lost(f"process {self.number} can't reach the others: {' '.join(str(error).split())[:200]}") from error
        if {name for name, _ in found} != {step}:
            raise OutOfStep(f"process {self.number} is at {step!r}, others at {[name for name, _ in found]}")
        return [part for _, part in found]

    def agree(self, work: Callable[[], T], step: str) -> T:
        """What `work` gives here, once it is done everywhere; what it raised anywhere is raised everywhere."""
        value, trouble = _tried(work)
        if self.count == 1:
            if trouble is not None:
                raise trouble
            return value
        troubles = [found for found in self.all(_portable(trouble), step) if found is not None]
        stopped = [found for found in troubles if isinstance(found, KeyboardInterrupt)]
        if troubles:
            raise (stopped or troubles)[0]
        return value

    def once(self, work: Callable[[], T], step: str) -> T:
        """What `work` gives in the first process, or what it raised there, for all of them."""
        if self.count == 1:
            return work()
        mine: tuple[Any, BaseException | None] = _tried(work) if self.first else (None, None)
        value, trouble = self.all((mine[0], _portable(mine[1])), step)[0]
        if trouble is not None:
            raise trouble
        return value

    def in_turn(self, work: Callable[[], T], step: str) -> T:
        """What `work` gives here; the first process does it before the others, which find what it has left."""
        if self.count == 1:
            return work()
        first: Any = self.agree(lambda: work() if self.first else None, f"{step}, the first")
        others: Any = self.agree(lambda: None if self.first else work(), f"{step}, the others")
        return first if self.first else others

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part: every `count`-th, so that sorted items are shared evenly."""
        return list(items[self.number :: self.count])


ALONE = Ranks()


@functools.cache
def here() -> Ranks:
    """This process among those that a launcher started; alone without one."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count == 1:
        return ALONE
    from accelerate import PartialState

    local = int(os.environ.get("LOCAL_RANK") or 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")  # `join` sees to that
        state = PartialState(cpu=True, timeout=PATIENCE)  # objects are exchanged, never tensors: gloo does
    for name in VARIABLES:
        os.environ.pop(name, None)
    return Ranks(state.process_index, state.num_processes, local)


def device(asked: str | None, processes: int) -> str | None:
    """The device of this process: its own GPU, unless the CPU was asked for.

    Args:
        asked: what the user named.
        processes: how many there are, or will be.

    Raises: UserError when they can't have a GPU each.
    """
    member = here()
    count = max(member.count, processes)
    if count == 1 or asked == "cpu":
        return asked
    if asked not in (None, "cuda"):
        raise UserError(f"several processes take a GPU each: --device cuda or cpu, not {asked!r}")
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        return asked
    if member.local >= there or (member.count == 1 and count > there):
        raise UserError(f"{count} processes take a GPU each, and torch sees {there}; --device cpu shares the CPU")
    return f"cuda:{member.local}"


@contextlib.contextmanager
def quiet_unless_first(ranks: Ranks) -> Iterator[None]:
    """Only the first process prints."""
    if ranks.first:
        yield
        return
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def launch(arguments: Sequence[str], count: int, member: Callable[..., None] | None = None) -> int:
    """Runs a command in `count` processes of this machine; returns the first one's exit code.

    Args:
        arguments: of the command.
        count: processes.
        member: what each of them runs; called as (number, arguments, count, port).

    Raises: UserError when a process died.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # whom it ends behind one that died
    given = (list(arguments), count, _free_port())
    context = start_processes(member or join, given, count, join=False, start_method="spawn")
    while True:
        try:
            if context.join():
                return 0
        except KeyboardInterrupt:  # they have it too, and stop behind their batches
            continue
        except ProcessExitedException as ended:
            if ended.error_index == 0 and ended.exit_code > 0:
                return ended.exit_code
            how = f"signal {-ended.exit_code}" if ended.exit_code < 0 else f"exit code {ended.exit_code}"
            raise UserError(_died(ended.error_index, how)) from None
        except ProcessRaisedException as ended:
            raise UserError(_died(ended.error_index, str(ended).strip().splitlines()[-1])) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _died(number: int, how: str) -> str:
    return f"process {number} died ({how}); answers are kept, the same command goes on from there"


def join(number: int, arguments: list[str], count: int, port: int) -> None:
    """Runs a command as one of the processes."""
    known = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in known.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from pruneval.harness import cli

    asked = os.environ.get("OMP_NUM_THREADS")
    here()
    torch.set_num_threads(int(asked or max(1, (os.cpu_count() or 1) // count)))
    try:
        cli.main(arguments)  # ends the process
    except Lost:
        time.sleep(PARTING)  # until it is known who died
        raise


def ended(ranks: Ranks, code: int) -> int:
    """The exit code of a command that has ended with `code`; of several processes, each ends here.

    The first one's exit code is the worst of all.
    """
    if ranks.count > 1:
        worst = max(ranks.all(code, "end"))
        leave(ranks, worst if ranks.first else 0)
    return code


def leave(ranks: Ranks, code: int) -> NoReturn:
    """Ends this process, in step with the others."""
    import torch

    ranks.all(None, "leave")
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads abort the interpreter's own end now and then


def _tried(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return work(), None
    except (Exception, KeyboardInterrupt) as error:
        return None, error


def _portable(trouble: BaseException | None) -> BaseException | None:
    """The error as another process can have it."""
    try:
        pickle.loads(pickle.dumps(trouble))
        return trouble
    except Exception:
        return RuntimeError(f"{type(trouble).__name__}: {' '.join(str(trouble).split())[:300]}")
