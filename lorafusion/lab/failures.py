"""Runs that failed: which, and how they are tried again."""

from collections.abc import Iterable
from contextlib import suppress

import psutil

from lorafusion.core.files import read_json
from lorafusion.core.schema import UserError
from lorafusion.lab.dag import Step
from lorafusion.lab.table.vocabulary import STATUSES

FAILED = set(STATUSES) - {"ok", "skipped"}
# By an accident, maybe. Memory that does not suffice and losses that are no numbers are findings, and stay.
ACCIDENTS = {"crash", "timeout"}
NAMED = 2  # in a line


def failures(runs: Iterable[Step]) -> dict[Step, str]:
    """The runs whose results say that they, or some of their numbers, failed; and as what: an accident before all."""
    failed = {}
    for step in runs:
        with suppress(UserError):  # missing or damaged: the step is to be made
            result = read_json(step.path, "result")
            statuses = [result.get("status"), *(row.get("status") for row in result.get("metrics", []))]
            bad = [status for status in statuses if status in FAILED]
            failed |= {step: min(bad, key=lambda status: status not in ACCIDENTS)} if bad else {}
    return failed


def accidents(failed: dict[Step, str]) -> list[Step]:
    """Of runs that failed, those that are worth another try."""
    return [step for step, status in failed.items() if status in ACCIDENTS]


def forget(runs: Iterable[Step]) -> None:
    """Take the results away of those runs that another try may mend, so that they are made again."""
    for step in accidents(failures(runs)):
        step.forget_key()
        step.path.unlink(missing_ok=True)


def statement(failed: dict[Step, str], command: str) -> str:
    """A line about runs that failed; empty where none did. command: that tries again those that it may mend."""
    if not failed:
        return ""
    names = [f"{step.relative} ({status})" for step, status in failed.items()]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    again = f"; to try again: {command}" if accidents(failed) else ""
    return f"failed: {', '.join(names[:NAMED])}{more}{again}"


def unmade(steps: Iterable[Step]) -> list[str]:
    """A line for each step that was begun and not made, as a job that several share does not say which. A log that is
    older than this process is of an earlier try."""
    since = psutil.Process().create_time()
    open_steps = [step for step in steps if not all(path.exists() for path in step.files)]
    begun = [step for step in open_steps if step.log.exists() and step.log.stat().st_mtime >= since]
    return [f"not made: {step.relative} (see {step.log})" for step in begun]
