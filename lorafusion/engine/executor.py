"""What an executor is to those that have it train: a function of a run, and perhaps what it needs before and after.

`execute(run)` trains a plan on this process's stage, from the first forward to the last step. It neither starts nor
stops a clock: `timed` does. What it must set up before, and put back after, is no part of that: `prepared_by` names it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lorafusion.engine.training import TrainingRun

Executor = Callable[..., bool | None]
Preparation = Callable[[TrainingRun], AbstractContextManager[Any]]


def prepared_by(preparation: Preparation) -> Callable[[Executor], Executor]:
    """Mark an executor that has a set-up of its own: a context manager around each run. The executor is called with the
    run and with what the context manager gives."""

    def mark(execute: Executor) -> Executor:
        execute.preparation = preparation
        return execute

    return mark


@contextmanager
def prepared(run: TrainingRun, execute: Executor) -> Iterator[Callable[..., bool]]:
    """Within it a run's executor is set up. What it gives trains the run, by whatever further arguments the executor
    takes, and returns False if it was asked to stop before the end."""
    preparation = getattr(execute, "preparation", None)
    if preparation is None:
        yield lambda *arguments: execute(run, *arguments) is not False
        return
    with preparation(run) as setup:
        yield lambda *arguments: execute(run, setup, *arguments) is not False
