"""Bayesian optimisation that can be killed and goes on: Gaussian process, expected improvement, a journal on disk.

Every trial's sampler is seeded by the trial's number, so that what is suggested depends on the finished trials only,
however often the search was interrupted between them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Params = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One evaluation: where, what it gave, and what the caller noted."""

    params: Params
    value: float
    notes: Mapping[str, Any]


class Study:
    """The studies of one search, in one journal file.

    Args:
        journal: the file; made if it is not there.
        seed: of the suggestions.
    """

    def __init__(self, journal: Path, seed: int) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal.parent.mkdir(parents=True, exist_ok=True)
        self.storage = JournalStorage(JournalFileBackend(str(journal)))
        self.seed = seed

    def maximise(
        self,
        name: str,
        space: Mapping[str, tuple[float, float]],
        evaluate: Callable[[Params], tuple[float, Mapping[str, Any]]],
        *,
        first: Sequence[Params],
        trials: int,
        on_trial: Callable[[Trial], None] = lambda trial: None,
    ) -> list[Trial]:
        """All trials, oldest first: those of `first`, then suggestions until there are `trials` in all.

        Args:
            name: of the study within the journal.
            space: (low, high) of each parameter.
            evaluate: the value at a place, larger is better, and notes that JSON can hold.
            first: where to begin.
            trials: in all.
            on_trial: called with every trial, also with those the journal already has.
        """
        import optuna
        from optuna.distributions import BaseDistribution, FloatDistribution
        from optuna.trial import TrialState

        study = optuna.create_study(
            storage=self.storage, study_name=name, direction="maximize", load_if_exists=True, sampler=_at({}, 0)
        )
        for left in study.get_trials(states=(TrialState.RUNNING,)):  # by a killed search
            study.tell(left.number, state=TrialState.FAIL)
        past = study.get_trials(states=(TrialState.COMPLETE,))
        done = [Trial(dict(one.params), one.value, dict(one.user_attrs)) for one in past if one.value is not None]
        for known in done:
            on_trial(known)
        free: dict[str, BaseDistribution] = {key: FloatDistribution(low, high) for key, (low, high) in space.items()}
        while len(done) < trials:
            fixed = dict(first[len(done)]) if len(done) < len(first) else {}
            study.sampler = _at(fixed, self._seed(name, len(done)))
            trial = study.ask(free)
            value, notes = evaluate(dict(trial.params))
            for key, note in notes.items():
                trial.set_user_attr(key, note)
            study.tell(trial, value)
            done.append(Trial(dict(trial.params), value, dict(notes)))
            on_trial(done[-1])
        return done

    def _seed(self, name: str, number: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{name}/{number}".encode()).digest()[:4], "big")


def _at(fixed: Params, seed: int) -> Any:
    """A sampler that suggests by expected improvement, but takes `fixed` as it is."""
    import optuna
    from optuna.samplers import GPSampler, PartialFixedSampler, RandomSampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if fixed:
            return PartialFixedSampler(fixed, RandomSampler(seed=seed))
        return GPSampler(seed=seed, n_startup_trials=0, deterministic_objective=True)


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest value; of equals the first."""
    return max(trials, key=lambda trial: trial.value)
