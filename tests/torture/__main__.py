"""`python -m tests.torture`: everything hostile that the program is tried with, and a table of what held.

The parts of `PARTS` come first, then hostile inputs, two at a time. The status is 1 where something failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.torture import inputs

# Modules with a function `run(count, seed, folder)` that returns a line for each failure; and how often they are tried.
PARTS: dict[str, int] = {"training_kills": 60, "training_damage": 100, "workflow_kills": 30}
INPUTS = "hostile inputs"
SEED = 25


class Outcome(NamedTuple):
    """What became of a part."""

    tried: int
    failures: list[str]
    seconds: float


def main() -> int:
    arguments = _arguments()
    chosen = [case for case in inputs.cases() if fnmatch(case.name, arguments.only or "*")]
    if not chosen:
        print(f"no hostile input is named {arguments.only}; --list lists them", file=sys.stderr)
        return 2
    if arguments.list:
        print(*(case.name for case in chosen), sep="\n")
        return 0
    names = [INPUTS] if arguments.only else arguments.part or [INPUTS, *PARTS]
    outcomes: dict[str, Outcome] = {}
    _try_parts([name for name in names if name in PARTS], arguments.seed, outcomes)
    if INPUTS in names:
        _try_inputs(chosen, outcomes)
    print(table(outcomes))
    if arguments.summary:
        arguments.summary.write_text(_summary(outcomes, arguments.seed, arguments.summary.suffix == ".json"))
    return int(any(outcome.failures for outcome in outcomes.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="hostile inputs of this name, with * and ?, and nothing else")
    parser.add_argument("--part", action="append", choices=[INPUTS, *PARTS], help="this part; may come several times")
    parser.add_argument("--list", action="store_true", help="print the names of the hostile inputs")
    parser.add_argument("--seed", type=int, default=SEED, help="of damages and of the moments of kills")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the table, or with .json all failures")
    return parser.parse_args()


def _try_inputs(cases: list, outcomes: dict[str, Outcome]) -> None:
    start = time.monotonic()
    wrong = inputs.run(cases)
    failures = [f"{name}: {'; '.join(lines)}" for name, lines in wrong.items() if lines]
    outcomes[INPUTS] = Outcome(len(cases), failures, time.monotonic() - start)


def _try_parts(names: list[str], seed: int, outcomes: dict[str, Outcome]) -> None:
    """One part after another, each in a process of its own."""
    for name in names:
        start = time.monotonic()
        with TemporaryDirectory(prefix=f"torture-{name}-") as folder:
            report = Path(folder) / "failures.json"
            code = (
                f"import json, pathlib; from tests.torture.{name} import run; folder = pathlib.Path({folder!r});"
                f"(folder / 'work').mkdir(); failures = run({PARTS[name]}, {seed}, folder / 'work');"
                f"pathlib.Path({str(report)!r}).write_text(json.dumps(failures))"
            )
            subprocess.run([sys.executable, "-c", code], check=False)
            failures = json.loads(report.read_text()) if report.exists() else ["ended without saying what failed"]
        for failure in failures:
            print(f"{name}: {failure}", flush=True)
        outcomes[name] = Outcome(PARTS[name], failures, time.monotonic() - start)


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes in Markdown."""
    lines = ["| part | tried | failed | minutes |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        failed, minutes = len(outcome.failures), outcome.seconds / 60
        lines.append(f"| {name.replace('_', ' ')} | {outcome.tried} | {failed} | {minutes:.1f} |")
    return "\n".join(lines)


def _summary(outcomes: dict[str, Outcome], seed: int, as_json: bool) -> str:
    if as_json:
        return (
            json.dumps({"seed": seed} | {name: outcome._asdict() for name, outcome in outcomes.items()}, indent=1)
            + "\n"
        )
    return table(outcomes) + "\n"


if __name__ == "__main__":
    sys.exit(main())
