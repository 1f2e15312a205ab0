"""The steps of a suite that measure or check something: workloads, tunings, plans, profiles, runs and checks."""

import os
import random
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

from lorafusion.core.config import names_in
from lorafusion.core.files import require_folder, write
from lorafusion.core.source_tree import tree_hash
from lorafusion.lab.checks.catalog import CHECKS, SuiteName, files_of, needed_by, run_check
from lorafusion.lab.checks.requirements import require_passed
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.dag import Kind, Step, Turn
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.experiments.end_to_end import unavailable
from lorafusion.lab.experiments.experiment import Experiment, Inputs, Point, is_path
from lorafusion.lab.keys import CellFiles, require_result_of, suite_files
from lorafusion.lab.suite import Suite, read_suite, step_command, suite_path

START = 80_000  # tokens that are trained while a run starts, about, as an H200 trains Llama-3.1-8B


def shuffled(names: list[str], repeat: int) -> list[str]:
    """Names in the order of one of the repeats: the same wherever it is asked for, another for each repeat. It depends
    on their places in the suite, not on what they are called."""
    order = list(names)
    random.Random(repeat).shuffle(order)
    return order


class MeasuredSteps:
    """The steps of a suite that measure or check something, and what they need. Some suites have an entry for an
    experiment and no file of configs/suites."""

    def __init__(self, suite: str | Path | None, folder: Path | None) -> None:
        self.suite: Suite | None = None
        if suite is not None and _is_entry_only(str(suite)):
            self.source = self.name = str(suite)
        else:
            # Relative, so that a checkout can be moved without its results being made again.
            self.source = os.path.relpath(suite_path(str(suite) if suite is not None else None))
            self.suite = read_suite(self.source)
            self.name = self.suite.name
        self.folder = folder if folder is not None else Path("results") / self.name
        require_folder(self.folder)
        self.points = {name: experiment.points(self.source) for name, experiment in EXPERIMENTS.items()}
        self.cells: dict[str, CellFiles] = suite_files(Path(self.source)) if self.suite else {}
        self.kinds: dict[str, Kind] = {}

    def _step(self, kind: Kind, name: str, make: Callable, settings: Callable[[], object], **options) -> Step:
        kind = self.kinds.setdefault(kind.name, kind)
        output = self.folder / kind.outputs[0].format(name=name)
        return Step(kind, name, self.folder, step_command(self.source, output), make, settings, **options)

    # Workloads, tunings and plans.

    @cached_property
    def able(self) -> dict[str, CellFiles]:
        """The cells that something installed here can run."""
        return {name: files for name, files in self.cells.items() if not unavailable(files.system)}

    @cached_property
    def workloads(self) -> dict[str, Step]:
        kind = Kind("workload", ("workloads/{name}.json",), quick=True)
        of = {files.cell.workload_name: files for files in self.cells.values()}
        return {
            name: self._step(kind, name, partial(_make_workload, files),
                             lambda files=files: files.expected_workload.content_hash,
                             read=lambda name=name, files=files: files.workload(self.workloads[name].path))
            for name, files in of.items()
        }  # fmt: skip

    @cached_property
    def tunings(self) -> dict[str, Step]:
        """By the cells whose capacity is looked for."""
        kind = Kind("tune_cell", ("tuned/{name}.json",))
        return {
            name: self._step(kind, name, partial(self._tune, files), lambda files=files: files.configuration,
                             inputs=(self._workload(files),), resources=self._resources(name),
                             tier=files.cell.grid.priority,
                             read=lambda name=name, files=files: files.tuned(self.tunings[name].path))
            for name, files in self.able.items() if files.cell.grid.tuned
        }  # fmt: skip

    def _tune(self, files: CellFiles, step: Step, launch: Callable) -> str:
        from lorafusion.lab.tuning import tune_cell

        return tune_cell(self.source, step.name, step.inputs[0].path, step.path, launch, step.resources.nodes)

    @cached_property
    def plans(self) -> dict[str, Step]:
        kind = Kind("plan", ("plans/{name}.json",), quick=True)
        return {
            name: self._step(kind, name, partial(self._plan, files), partial(self._plan_settings, files),
                             inputs=(self._workload(files), *self._tuning(name)), read=partial(self._read_plan, name))
            for name, files in self.able.items()
        }  # fmt: skip

    def _plan(self, files: CellFiles, step: Step, launch: Callable) -> str:
        from lorafusion.lab.tuning import plan_cell

        capacity = files.capacity(files.tuned(self._tuned_path(step.name)))
        plan = plan_cell(files.expected_workload, files, capacity)
        write(step.path, plan.to_json())
        return f"{len(plan.microbatches)} microbatches" + files.graphs_note

    def _plan_settings(self, files: CellFiles) -> list[object]:
        cell, system = files.cell, files.system.model_dump(mode="json", include={"planner", "options"})
        capacity = None if cell.grid.tuned else cell.grid.capacity_of(cell.workload)
        costs = files.costs.model_dump(mode="json")
        return [cell.system, system, cell.stages, cell.grid.data_parallel, capacity, costs, *["graphs"] * files.graphs]

    def _read_plan(self, name: str):
        """The plan of a cell; None for a cell that nothing installed here can run."""
        if name not in self.plans:
            return None
        return self.cells[name].plan(self.plans[name].path, self.cells[name].tuned(self._tuned_path(name)))

    def _workload(self, files: CellFiles) -> Step:
        return self.workloads[files.cell.workload_name]

    def _tuning(self, name: str) -> list[Step]:
        return [self.tunings[name]] if name in self.tunings else []

    def _tuned_path(self, name: str) -> Path | None:
        return self.tunings[name].path if name in self.tunings else None

    def _plan_path(self, name: str) -> Path | None:
        return self.plans[name].path if name in self.plans else None

    def _resources(self, name: str) -> Resources:
        point = next(point for point in self.points["end_to_end"] if point.name == name)
        return EXPERIMENTS["end_to_end"].resources(point)

    @cached_property
    def profiles(self) -> dict[str, Step]:
        """The cells of which a profile is made; only a GPU's kernels can be told apart."""
        if not self.suite or self.suite.device == "cpu":
            return {}
        kind = Kind("profile", ("profiles/{name}.csv", "profiles/{name}.csv.sha256"))
        return {
            name: self._step(kind, name, self._profile, lambda files=files: files.configuration,
                             inputs=(self._workload(files), self.plans[name], *self._tuning(name)),
                             resources=self._resources(name), tier=files.cell.grid.priority,
                             read=lambda name=name, files=files: files.profile(self.profiles[name].path,
                                                                               self._read_plan(name)))
            for name, files in self.able.items() if files.cell.workload in self.suite.profiled
        }  # fmt: skip

    def _profile(self, step: Step, launch: Callable) -> str:
        from lorafusion.lab.tuning import profile_cell

        workload, plan = step.inputs[0].path, step.inputs[1].path
        tuned, nodes = self._tuned_path(step.name), step.resources.nodes
        return profile_cell(self.source, step.name, workload, plan, step.path, tuned, launch, nodes)

    # The points of the experiments, each in fresh processes, repeat after repeat.

    @cached_property
    def runs(self) -> dict[str, list[Step]]:
        """By experiment: the first repeat of all its points in an order of its own, then the second, and so on. Drift
        of the machine then spreads over them and is not taken for a difference between them. All repeats of points of a
        higher priority come first."""
        return {name: list(self._runs_of(EXPERIMENTS[name], points)) for name, points in self.points.items() if points}

    def _runs_of(self, experiment: Experiment, points: list[Point]) -> Iterator[Step]:
        by_name = {point.name: point for point in points}
        most = max(point.repeats for point in points)
        turns = [(name, repeat) for repeat in range(1, most + 1) for name in shuffled(list(by_name), repeat)
                 if repeat <= by_name[name].repeats]  # fmt: skip
        turns.sort(key=lambda turn: -by_name[turn[0]].priority)
        for place, (name, repeat) in enumerate(turns):
            yield self._run(experiment, by_name[name], repeat, priority=len(turns) - place)

    def _run(self, experiment: Experiment, point: Point, repeat: int, priority: int) -> Step:
        stem = f"{experiment.folder}/runs/{{name}}".lstrip("/")
        outputs = (f"{stem}.json", *(f"{stem}{suffix}" for suffix in experiment.more_outputs(point)))
        options: dict = {"inputs": tuple(self.checks[name] for name in experiment.checks if name in self.checks)}
        settings: list[object] = [repeat]
        if experiment.name == "end_to_end":
            files = self.cells[point.name]
            plan = [self.plans[point.name]] if point.name in self.plans else []
            options["inputs"] = (self._workload(files), *plan, *self._tuning(point.name))
            options["turn"] = Turn(files.cell.workload_name, repeat, partial(_cost, files))
            settings.append(self.suite.cost)
        kind = Kind("run" if not experiment.folder else f"{experiment.folder}_bench", outputs,
                    fresh=experiment.name != "end_to_end")  # fmt: skip
        return self._step(kind, f"{point.name}/repeat~{repeat}", partial(self._make_run, experiment, point, repeat),
                          lambda: [*settings, experiment.key(point)], priority=priority,
                          tier=point.priority, resources=experiment.resources(point),
                          read=lambda: self._read_run(experiment, point, repeat), **options)  # fmt: skip

    def _make_run(self, experiment: Experiment, point: Point, repeat: int, step: Step, launch: Callable) -> str:
        inputs = Inputs(launch=launch)
        if experiment.name == "end_to_end":
            workload = self._workload(self.cells[point.name]).path
            inputs = Inputs(workload, self._plan_path(point.name), self._tuned_path(point.name),
                            step.resources.nodes, launch)  # fmt: skip
        return experiment.run(point, repeat, step.path, step.log, inputs)

    def _read_run(self, experiment: Experiment, point: Point, repeat: int) -> object:
        stem = self.folder / experiment.folder / "runs" / point.name / f"repeat~{repeat}.json"
        if experiment.name == "end_to_end":
            return self.cells[point.name].result(stem, self._read_plan(point.name), repeat)
        return require_result_of(stem, experiment.key(point), repeat)

    # Checks, tables, pages and figures.

    @cached_property
    def checks(self) -> dict[str, Step]:
        names = {name for key, points in self.points.items() if points for name in EXPERIMENTS[key].checks}
        names |= set(needed_by("runs")) if self.suite else set()
        names -= set() if self.points["kernels"] else {"kernels"}
        return {name: self._check(name) for name in CHECKS if name in names}

    def _check(self, name: str) -> Step:
        kind = Kind(f"check_{name}", tuple(f"checks/{file}" for file in files_of(name)))
        entry = self.points["kernels"][0].settings if name == "kernels" else self.suite
        settings = partial(_check_settings, name, self.suite or SuiteName(self.name))
        return self._step(kind, "", partial(self._make_check, name), settings, resources=self._check_resources(name),
                          read=lambda: require_passed(self.checks[name].path, name, self.name, tree_hash(),
                                                      entry.dtype))  # fmt: skip

    def _check_resources(self, name: str) -> Resources:
        """A GPU for each process, as far as a node has them and the suite uses them; kernels are checked on one."""
        minutes = CHECKS[name].minutes
        if name == "kernels":
            return Resources(minutes, 16_000, gpus=int(self.points["kernels"][0].settings.device == "cuda"))
        processes = CHECKS[name].processes(self.suite)
        most = max(files.cell.gpus for files in self.cells.values())
        gpus = min(self.suite.gpus_per_node, most, processes) if self.suite.device == "cuda" else 0
        whole_nodes = gpus == self.suite.gpus_per_node
        return Resources(minutes, 2000 * processes, processes, gpus, whole_nodes=whole_nodes)

    def _make_check(self, name: str, step: Step, launch: Callable) -> str:
        outcome = run_check(name, Path(self.source))
        print(*outcome.lines(), sep="\n", flush=True)
        outcome.write_to(step.path.parent)
        return outcome.verdict.statement


def _is_entry_only(suite: str) -> bool:
    """Has a suite an entry for an experiment, and no file of configs/suites?"""
    if is_path(suite) or suite in names_in("suites"):
        return False
    return any(experiment.points(suite) for experiment in EXPERIMENTS.values())


def _cost(files: CellFiles) -> int:
    return 0 if unavailable(files.system) else files.expected_workload.tokens + START


def _check_settings(name: str, suite: Suite | SuiteName) -> list[object]:
    include = {"device", "dtype", "adapter_dtype"}
    settings = suite.model_dump(mode="json", include=include) if isinstance(suite, Suite) else {}
    return [settings, CHECKS[name].depends_on(suite)]


def _make_workload(files: CellFiles, step: Step, launch: Callable) -> str:
    write(step.path, files.expected_workload.to_json())
    return f"{files.expected_workload.tokens} tokens"
