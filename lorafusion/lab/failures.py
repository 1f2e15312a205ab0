"""Runs that failed: which, and how they are tried again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from lorafusion.core.files import read_json
from lorafusion.core.schema import UserError
from lorafusion.lab.dag import Step
from lorafusion.lab.table.vocabulary import STATUSES

FAILED = set(STATUSES) - {"ok", "skipped"}
NAMED = 2  # in a line


def failures(runs: Iterable[Step]) -> dict[Step, str]:
    """The runs whose results say that they, or some of their numbers, failed; and as what."""
    failed = {}
    for step in runs:
        with suppress(UserError):  # missing or damaged: the step is to be made
            result = read_json(step.path, "result")
            statuses = [result.get("status"), *(row.get("status") for row in result.get("metrics", []))]
            bad = [status for status in statuses if status in FAILED]
            failed |= {step: bad[0]} if bad else {}
    return failed


def forget(runs: Iterable[Step]) -> None:
    """Take the results of runs away, so that they are made again."""
    for step in runs:
        step.forget_key()
        step.path.unlink(missing_ok=True)


def statement(failed: dict[Step, str], command: str) -> str:
    """A line about runs that failed; empty where none did. command: that tries them again."""
    if not failed:
        return ""
    names = [f"{step.relative} ({status})" for step, status in failed.items()]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"failed: {', '.join(names[:NAMED])}{more}; to try again: {command}"
