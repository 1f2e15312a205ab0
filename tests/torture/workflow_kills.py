"""Kills of a workflow at random moments, each with the same command again at once.

`lorafusion reproduce`, Snakemake under it, the runner of a step, torchrun and workers get SIGKILL. Nothing of a
finished run may be made again, no file be torn, no second driver get in, and nothing be left running; in the end the
results are those of a run without kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from lorafusion.core.config import CONFIGS
from tests.torture import toy_workflow

ROOT = CONFIGS.parent
PARTS = ("worker", "reproduce", "runner", "snakemake", "torchrun")  # in the order in which they are killed
PATIENCE = 300  # seconds for what takes a few on an idle machine


def run(count: int, seed: int, folder: Path) -> list[str]:
    """Kill `count` times; returns a line for each thing that went wrong. Up to five kills are of runs of one process
    each."""
    begin = time.monotonic()
    workflow = _Workflow(folder, [1] if count <= 5 else [1, 2], random.Random(seed))
    try:
        for number in range(count):
            workflow.kill(PARTS[number % (4 if count <= 5 else 5)])
            if number % 7 == 0:
                workflow.try_a_second()
        workflow.finish()
    finally:
        workflow.end()
    killed = ", ".join(f"{times} of {part}" for part, times in workflow.killed.items())
    print(
        f"{count} kills of a workflow ({killed}), {workflow.starts} starts, {workflow.failed} runs killed twice, "
        f"{time.monotonic() - begin:.0f} s: {len(workflow.failures)} failures",
        flush=True,
    )
    return workflow.failures


class _Workflow:
    def __init__(self, folder: Path, processes: list[int], chooser: random.Random) -> None:
        self.folder, self.chooser = folder.absolute(), chooser
        self.results = self.folder / "results" / toy_workflow.SUITE
        self.failures: list[str] = []
        self.killed: Counter[str] = Counter()
        self.finished: dict[Path, int] = {}
        self.starts = self.failed = 0
        self.driver: psutil.Popen | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        toy_workflow.write_suite(self.folder / "suite.yaml", processes)
        paths = [toy_workflow.HOOK, ROOT, ROOT / "kernels"]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}

    def command(self, *options: str) -> psutil.Popen:
        words = [sys.executable, "-m", "lorafusion.cli.main", "reproduce", "suite.yaml", *options]
        with open(self.folder / "log", "a") as log:
            return psutil.Popen(words, cwd=self.folder, env=self.environment, stdout=log, stderr=log,
                                start_new_session=True)  # fmt: skip

    def start(self, *options: str) -> None:
        self.starts += 1
        self.driver = self.command(*options)

    def kill(self, part: str) -> None:
        """Kill a process of a kind, soon after there is one; start the workflow first, where it has ended."""
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            if self.driver is None or self.driver.poll() is not None:
                self.begin_again()
            victims = self.processes().get(part, [])
            if victims:
                time.sleep(self.chooser.uniform(0, 2.0 if part in ("reproduce", "snakemake") else 1.0))
                self.note_finished()
                victim = self.chooser.choice(victims)
                if victim.is_running():
                    with suppress(psutil.NoSuchProcess):
                        victim.kill()
                        self.killed[part] += 1
                        self.after(part)
                        return
            time.sleep(0.05)
        self.failures.append(f"no {part} to kill for {PATIENCE} s")

    def begin_again(self) -> None:
        """Where all is done, some results are lost first: they must come back."""
        assert self.driver is None or self.driver.returncode != 2, (self.folder / "log").read_text()[-1000:]
        if self.driver is not None and self.driver.returncode == 0:
            for path in self.chooser.sample(sorted(self.finished), min(2, len(self.finished))):
                del self.finished[path]
                path.unlink()
        self.start("--again")

    def after(self, part: str) -> None:
        if part in ("reproduce", "snakemake"):  # the others are the workflow's to deal with
            try:
                self.driver.wait(PATIENCE)
            except psutil.TimeoutExpired:
                self.failures.append(f"reproduce goes on for {PATIENCE} s after {part} was killed")
        self.look_for_torn_files()

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The workflow's by what they are."""
        kinds: dict[str, list[psutil.Process]] = {}
        with suppress(psutil.NoSuchProcess):
            for process in [self.driver, *self.driver.children(recursive=True)]:
                with suppress(psutil.Error):
                    words = process.cmdline()
                    kind = _part(words, process.pid == self.driver.pid)
                    if kind:
                        kinds.setdefault(kind, []).append(process)
        return kinds

    def note_finished(self) -> None:
        """Remember the results that are there, with their keys, and whose process has ended."""
        at_work = {word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or []}
        for path in self.results.rglob("repeat~*.json"):
            key = path.with_name(f"{path.name}.key")
            if key.exists() and str(path.relative_to(self.folder)) not in at_work and _status(path) != "crash":
                time_of = path.stat().st_mtime_ns
                if self.finished.setdefault(path, time_of) != time_of:
                    self.failures.append(f"{path.relative_to(self.results)}: was finished, and was made again")
                    self.finished[path] = time_of

    def look_for_torn_files(self) -> None:
        for path in self.results.rglob("*.json"):
            with suppress(FileNotFoundError):
                try:
                    json.loads(path.read_text())
                except ValueError:
                    self.failures.append(f"{path.relative_to(self.results)}: torn")

    def try_a_second(self) -> None:
        """Beside a workflow at work: refused in one line, with status 2."""
        if self.driver.poll() is not None:
            self.start("--again")
        limit = time.monotonic() + PATIENCE
        while "snakemake" not in self.processes() and self.driver.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        second = self.command()
        status = second.wait(PATIENCE)
        if status != 2 and self.driver.poll() is None:
            self.failures.append(f"a second workflow beside process {self.driver.pid} ended with status {status}")

    def finish(self) -> None:
        """The same command until all is well; then nothing may be missing, other or left."""
        for options in ([], ["--again"], ["--again"], ["--again"]):
            if self.driver is None or self.driver.poll() is not None:
                self.start(*options)
            if self.driver.wait(2 * PATIENCE) == 0:
                break
            self.failed += any(_status(path) == "crash" for path in self.results.rglob("repeat~*.json"))
        else:
            self.failures.append(f"ended with status {self.driver.returncode}; {self.folder / 'log'} says more")
        self.note_finished()
        self.failures += [f"{path}: is gone" for path in self.finished if not path.exists()]
        self.look_for_torn_files()
        self.compare()

    def compare(self) -> None:
        from lorafusion.core.plan import Plan
        from lorafusion.core.workload import Workload
        from lorafusion.lab.dag import state
        from lorafusion.lab.steps import dag_of
        from lorafusion.lab.table.result import metrics

        os.chdir(self.folder)
        dag, seen = dag_of("suite.yaml"), {}
        self.failures += [f"{step.relative}: {state(step, seen)}" for step in dag.of_target("all") if state(step, seen)]
        for step in dag.runs if not self.failures else ():
            workload, plan = Workload.read(step.inputs[0].path), Plan.read(step.inputs[1].path)
            expected = metrics(toy_workflow.report_of(workload, plan), workload, plan)
            numbers = json.loads(step.path.read_text())["metrics"]
            measured = [number for number in numbers if number["cell"].get("kind") != "simulated"]
            if measured != json.loads(json.dumps(expected)):
                self.failures.append(f"{step.relative}: has other numbers")
        if not (self.results / "report.html").exists():
            self.failures.append("no report.html")

    def end(self) -> None:
        """Nothing may be left running a moment after the end."""
        left = self.left()
        limit = time.monotonic() + 20
        while left and time.monotonic() < limit:
            time.sleep(0.2)
            left = self.left()
        for process in left:
            with suppress(psutil.Error):
                self.failures.append(f"left running: {' '.join(process.cmdline())[:200]}")
                process.send_signal(signal.SIGKILL)

    def left(self) -> list[psutil.Process]:
        """The processes that are at work in the folder."""
        running = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and Path(process.cwd()) == self.folder:
                    running.append(process)
        return running


def _part(words: list[str], is_driver: bool) -> str:
    if is_driver:
        return "reproduce"
    if "snakemake" in words and "--profile" in words and "--dry-run" not in words:
        return "snakemake"
    if "lorafusion.engine.agent" in words:
        return "torchrun"
    if toy_workflow.__name__ in words:
        return "worker"
    return "runner" if "--step" in words else ""


def _status(path: Path) -> str:
    with suppress(FileNotFoundError):
        return json.loads(path.read_text())["status"]
    return ""


if __name__ == "__main__":
    print(*run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])), sep="\n")
