"""The list of a suite's steps: with `measured_steps`, the only place that says what is made from what.

Here are the tables, pages and figures, what is published, and the whole list. A new experiment, check or figure is an
entry of its registry (`EXPERIMENTS`, `CHECKS`, `FIGURES`) and has its steps without a line here.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

from lorafusion.core.files import write
from lorafusion.core.schema import UserError
from lorafusion.core.seals import require_seal
from lorafusion.lab.checks.verdicts import CheckOutcome, origin_of
from lorafusion.lab.cluster.request import Resources
from lorafusion.lab.dag import Dag, Kind, Step
from lorafusion.lab.experiments import EXPERIMENTS
from lorafusion.lab.gather import TABLE_SUFFIXES, gather
from lorafusion.lab.measured_steps import MeasuredSteps
from lorafusion.lab.report.registry import FIGURES, FORMATS, Figure, draw
from lorafusion.launch.launch import end_with_parent

BUILD, TUNE = "fused_lora.tools.build", "fused_lora.tools.tune"  # modules that are run


def dag_of(suite: str | Path | None = None, folder: Path | None = None) -> Dag:
    """All steps of a suite, by its name or the path of its file; without one, of the suite that fits this machine.
    folder: of its results, by default results/NAME."""
    return SuiteSteps(suite, folder).dag()


def step_at(suite: str | Path, path: Path) -> tuple[Dag, Step]:
    """The step of a suite that writes a file, in whichever folder that is, and all steps there."""
    dag = dag_of(suite)
    outputs = [(step, output.relative_to(dag.folder).parts) for step in dag.steps for output in step.outputs]
    matches = [(step, parts) for step, parts in outputs if path.parts[-len(parts) :] == parts]
    if not matches:
        raise UserError(f"--step: {path}: no step of {suite} writes it; `lorafusion lab list {suite}` lists them")
    step, parts = max(matches, key=lambda pair: len(pair[1]))
    folder = Path(*path.parts[: -len(parts)])
    if folder != dag.folder:
        dag = dag_of(suite, folder)
        step = next(other for other in dag.steps if other.relative == step.relative)
    return dag, step


class SuiteSteps(MeasuredSteps):
    """All steps of a suite."""

    def dag(self) -> Dag:
        steps = [*self.checks.values(), *self.workloads.values(), *self.tunings.values(), *self.plans.values()]
        runs = [run for runs in self.runs.values() for run in runs]
        steps += [*self.profiles.values(), *runs]
        steps += [
            *self.tables.values(),
            *self.cost_profile,
            *self.pages,
            *self.figures.values(),
            *self.published,
            *self.tools.values(),
        ]
        return Dag(self.source, self.name, self.folder, tuple(steps), frozenset(runs), self._targets())

    def _targets(self) -> dict[str, list[Step]]:
        of = {
            name: [*([self.tables[name]] if name in self.tables else []),
                   *(step for (figure, _), step in self.figures.items() if FIGURES[figure].experiment == name)]
            for name in EXPERIMENTS
        }  # fmt: skip
        of["costs"] += self.cost_profile
        kernels = [*self.tools.values()][:1] + [self.checks[name] for name in ("kernels",) if name in self.checks]
        targets = {"all": [*(step for steps in of.values() for step in steps), *self.pages, *self.published]}
        for name, experiment in EXPERIMENTS.items():
            if experiment.folder and of[name]:
                targets[experiment.folder] = (kernels if name == "kernels" else []) + of[name]
        return targets | ({"tune": [self.tools["tune_kernels"]]} if self.tools else {})

    @cached_property
    def tables(self) -> dict[str, Step]:
        """The measurement tables by experiment."""
        tables = {}
        for name, runs in self.runs.items():
            folder = EXPERIMENTS[name].folder
            stem = f"{folder}/measurements".lstrip("/")
            what = folder or "systems"
            kind = Kind(f"{folder}_measurements".lstrip("_"), tuple(f"{stem}{suffix}" for suffix in TABLE_SUFFIXES),
                        quick=True, category="Measurements", caption="measurements.rst",
                        labels={f"{stem}.csv": f"{what}: every number (CSV)",
                                f"{stem}.html": f"{what}: medians and runs (page)"})  # fmt: skip
            tables[name] = self._step(kind, "", partial(self._make_table, name),
                                     lambda name=name: {point.name: point.repeats for point in self.points[name]},
                                     inputs=tuple(runs),
                                     read=lambda name=name: require_seal(self.tables[name].path))  # fmt: skip
        return tables

    def _make_table(self, name: str, step: Step, launch: Callable) -> str:
        results = [run.path for run in step.inputs]
        return gather(step.path.parent, results, Path(self.source) if name == "end_to_end" else None)

    @cached_property
    def cost_profile(self) -> list[Step]:
        """What the times of stages are fitted with, for a suite that measures any."""
        if not any(point.subject for point in self.points["costs"]):
            return []
        kind = Kind("cost_profile", ("costs/profile.yaml",), quick=True)
        return [self._step(kind, "", _fit_costs, lambda: None, inputs=(self.tables["costs"],))]

    @cached_property
    def pages(self) -> list[Step]:
        """The plans checked, and the page of all checks."""
        if not self.cells:
            return []
        plans = self._step(Kind("check_plans", ("checks/plans.json",), quick=True), "", self._check_plans, lambda: None,
                           inputs=(*self.plans.values(), *self.workloads.values()))  # fmt: skip
        kind = Kind("checks", ("checks.html",), quick=True, category="Checks", caption="checks.rst",
                    labels={"checks.html": "what the figures rest on (page)"})  # fmt: skip
        return [self._step(kind, "", _make_checks_page, lambda: None, inputs=(plans, *self.checks.values())), plans]

    def _check_plans(self, step: Step, launch: Callable) -> str:
        from lorafusion.lab.checks.plans import check_plans

        plans, workloads = ([source.path for source in step.inputs if source.kind.name == kind]
                            for kind in ("plan", "workload"))  # fmt: skip
        verdict = check_plans(plans, workloads)
        CheckOutcome(verdict, origin_of(self.name, self.suite.device, self.suite.dtype)).write(step.path)
        return verdict.statement

    @cached_property
    def figures(self) -> dict[tuple[str, str], Step]:
        """By the names of the figure and of its model, which is empty for a figure of all."""
        figures = {}
        for name, figure in FIGURES.items():
            points = self.points[figure.experiment]
            if not points or (figure.setting and not getattr(points[0].settings, figure.setting)):
                continue
            for model in self._models_of(figure) if figure.per_model else [""]:
                sources = self._sources(figure, model)
                if sources:
                    figures[name, model] = self._figure(name, figure, model, sources)
        return figures

    def _models_of(self, figure: Figure) -> list[str]:
        """The models that have, on some number of GPUs, all systems that the figure takes."""
        systems: dict[tuple[str, int], list[str]] = {}
        for files in self.cells.values():
            if not files.cell.grid.merged_qkv:
                systems.setdefault((files.cell.model, files.cell.gpus), []).append(files.cell.system)
        every = {(files.cell.model, files.cell.gpus) for files in self.cells.values()}
        return sorted({model for model, gpus in every if not figure.lacking(systems.get((model, gpus), []))})

    def _sources(self, figure: Figure, model: str) -> dict[Step, Path]:
        """What a figure is drawn from: files, by the steps that make them."""
        if figure.source == "table":
            return {self.tables[figure.experiment]: self.tables[figure.experiment].path}
        if figure.source == "curves":
            return {self.checks["lossless"]: self.folder / "checks" / "lossless.csv"}
        if figure.source == "tunings":
            return {step: step.path for name, step in self.tunings.items() if self.cells[name].cell.model == model}
        if figure.experiment == "end_to_end":
            return {step: step.path for step in self.profiles.values()}
        runs = self.runs[figure.experiment]
        return {step: path for step in runs for path in step.outputs if path.name.endswith(".profile.csv")}

    def _figure(self, name: str, figure: Figure, model: str, sources: dict[Step, Path]) -> Step:
        stem = f"figures/{name}" + ("~{name}" if figure.per_model else "")
        label = figure.label.replace("{model}", "{name}")
        kind = Kind(name, tuple(f"{stem}.{form}" for form in FORMATS), quick=True, category=figure.category,
                    caption=figure.caption,
                    labels={f"{stem}.{form}": f"{label} ({form.upper()})" for form in figure.shown})  # fmt: skip
        # The page needs all checks, also that of the plans.
        verdicts = self.pages[:1] if figure.experiment == "end_to_end" else [self.checks[key] for key in figure.checks
                                                                             if key in self.checks]  # fmt: skip
        verdicts = verdicts if figure.checks else []
        return self._step(kind, model, partial(self._draw, name, list(sources.values())), lambda: None,
                          inputs=(*sources, *verdicts))  # fmt: skip

    def _draw(self, name: str, files: list[Path], step: Step, launch: Callable) -> str:
        checks = self.folder / "checks" if FIGURES[name].checks else None
        draw(name, files, step.path.with_suffix(""), step.name or None, checks)
        return ".png, .pdf, .csv"

    @cached_property
    def published(self) -> list[Step]:
        if not self.cells:
            return []
        figures = [step for (name, _), step in self.figures.items() if FIGURES[name].source == "table"
                   and FIGURES[name].experiment == "end_to_end"]  # fmt: skip
        kind = Kind("publish", ("wandb",), quick=True, directory=True)
        inputs = (self.tables["end_to_end"], *figures, *self.runs["end_to_end"])
        return [self._step(kind, "", _publish, lambda: None, inputs=inputs)]

    @cached_property
    def tools(self) -> dict[str, Step]:
        """Kernels built ahead of time, and their choices looked for. No part of any other step: the kernels read
        kernels/fused_lora/tuned/<gpu>.json, which this does not replace."""
        if not self.points["kernels"]:
            return {}
        build = Kind("build_kernels", ("kernels/build.csv",), fresh=True)
        tune = Kind("tune_kernels", ("kernels/tuned.json",), fresh=True)
        # Compilers hold the machine too: they would disturb a measurement's clock.
        return {
            "build_kernels": self._step(build, "", partial(_run_tool, BUILD), lambda: None,
                                        resources=Resources(15, 8000, cpus=4)),
            "tune_kernels": self._step(tune, "", partial(_run_tool, TUNE), lambda: None,
                                       resources=Resources(120, 32_000, cpus=8, gpus=1)),
        }  # fmt: skip


def _fit_costs(step: Step, launch: Callable) -> str:
    from lorafusion.lab.cost_profile import fit_tables

    return fit_tables([source.path for source in step.inputs], step.path)


def _make_checks_page(step: Step, launch: Callable) -> str:
    from lorafusion.lab.report.pages import checks_page

    write(step.path, checks_page([source.path for source in step.inputs]))
    return f"{len(step.inputs)} checks"


def publish_files(table: Path, results: list[Path], figures: list[Path], folder: Path, **options) -> str:
    """Hand a table, its results and figures to wandb. options: of `wandb_publisher.publish`."""
    from lorafusion.lab.report.wandb_publisher import publish
    from lorafusion.lab.table.table import read, read_result

    contents = [read_result(path) for path in results]
    runs = publish(read(table), contents, figures, folder, **options)
    return f"{folder}: {len(runs)} runs, {options.get('mode', 'offline')}"


def published_files(step: Step) -> tuple[Path, list[Path], list[Path]]:
    """The table, results and figures among the inputs of a step that publishes them."""
    table, *others = [source.path for source in step.inputs]
    return (
        table,
        [path for path in others if path.suffix == ".json"],
        [path for path in others if path.suffix == ".png"],
    )


def _publish(step: Step, launch: Callable) -> str:
    return publish_files(*published_files(step), step.path)


def _run_tool(module: str, step: Step, launch: Callable) -> str:
    words = [sys.executable, "-m", module, "--jobs", str(step.resources.cpus), "--out", str(step.path)]
    if subprocess.run(words, check=False, preexec_fn=end_with_parent).returncode:
        raise UserError(f"{step.path}: {module} failed; its output says why")
    return "done"
