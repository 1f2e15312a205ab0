"""The table of figures: what each is drawn from, which checks must have passed first, and how the report shows it.

The command line, the workflow and the report read `FIGURES`, and know no figure by name. A new figure is an entry here
and two functions in a module of `figures`: NAME_data, which takes the source and gives what is shown, and draw_NAME,
which draws that. The module is imported when the figure is drawn, so that reading the table loads neither torch nor
matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorafusion.core.config import names_in
from lorafusion.core.schema import UserError, one_of
from lorafusion.lab.checks.catalog import needed_by

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Picture

    # What a figure shows, as its CSV has it, and what draws it from there.
    Drawing = tuple[pd.DataFrame, Callable[[pd.DataFrame], Picture]]

OF_RUNS, OF_KERNELS, OF_STEPS = map(needed_by, ("runs", "kernels", "steps"))
FORMATS = ("png", "pdf", "csv")
# What a figure can be drawn from, as the command line describes it.
SOURCES = {
    "table": "a measurement table",
    "curves": "the losses that the check `lossless` wrote",
    "profiles": "CSVs of profiled cells or training steps",
    "tunings": "files of tuned cells",
}


@dataclass(frozen=True)
class Figure:
    """An entry of the table.

    module: of `lorafusion.lab.report.figures`, where NAME_data and draw_NAME are.
    source: a key of `SOURCES`. experiment: whose results they are.
    caption: a file of workflow/report.
    title: the name in the report, by default that of the figure; may hold {model}.
    checks: the checks that must have passed.
    shown: the formats that the report shows, of `FORMATS`, all of which are written.
    lacking: the systems that the figure takes and that are not among those of a model's cells.
    setting: a field of the experiment's suite; where it is empty there is no such figure.
    """

    name: str
    module: str
    source: Literal["table", "curves", "profiles", "tunings"]
    experiment: Literal["end_to_end", "kernels", "grid", "planner", "steps", "costs"]
    caption: str
    title: str = ""
    checks: Sequence[str] = ()
    per_model: bool = False
    shown: Sequence[str] = ("png", "pdf")
    category: str = "Figures"
    lacking: Callable[[Iterable[str]], list[str]] = lambda systems: []
    setting: str = ""

    @property
    def label(self) -> str:
        return self.title or self.name

    def make(self, source: Any, model: str | None = None) -> Drawing:
        """What the figure shows of its source, which is the measurement table or the paths of other files. model: if
        `per_model`. Raises `MeasurementError` where the source lacks that."""
        module = import_module(f"lorafusion.lab.report.figures.{self.module}")
        data, draw = getattr(module, f"{self.name}_data"), getattr(module, f"draw_{self.name}")
        return data(source, model) if self.per_model else data(source), draw

    def draw(self, source: Any, stem: str | Path, model: str | None = None) -> list[Path]:
        """Write `stem`.csv, draw it, and write `stem`.pdf and .png; returns their paths.

        source and model: as `make` takes them.
        """
        from lorafusion.lab.report.drawing import written

        return written(*self.make(source, model), stem)


def draw(
    name: str,
    files: Sequence[Path],
    stem: str | Path,
    model: str | None = None,
    checks: Path | None = None,
    suite: str = "",
) -> list[Path]:
    """Draw a figure from files, for the command line; returns the paths written.

    checks: the folder of the verdicts; by default `checks` beside the table. suite: name or path; of a table that has
    it beside others only its rows are drawn. Raises `UserError` for a figure that is not in the table, a model or a
    number of files that do not fit it, and checks that have not passed.
    """
    one_of("figure", name, set(FIGURES), "figure")
    figure = FIGURES[name]
    if figure.per_model != (model is not None):
        models = f"expected a model, as {', '.join(sorted(names_in('models')))}"
        raise UserError(f"figure {name}: --model: {models if figure.per_model else 'it takes none'}")
    if checks and not figure.checks:
        raise UserError(f"figure {name}: --checks: it rests on none")
    if figure.source in ("table", "curves") and len(files) != 1:
        raise UserError(f"figure {name}: expected one file, {SOURCES[figure.source]}; found {len(files)}")
    source: Any = files
    if figure.source == "table":
        from lorafusion.lab.checks.requirements import checked_table

        source = checked_table(files[0], checks, figure.checks, suite)
    try:
        return figure.draw(source, stem, model)
    except UserError as error:
        names = ", ".join(map(str, files))
        lines = [line if line.startswith(tuple(map(str, files))) else f"{names}: {line}" for line in error.mistakes]
        raise UserError(*lines) from None


def _contributions_lack(systems: Iterable[str]) -> list[str]:
    from lorafusion.lab.report.ratios import lacking

    return lacking(systems)


FIGURES = {figure.name: figure for figure in (
    # name, module, source, experiment, caption
    Figure("end_to_end", "end_to_end", "table", "end_to_end", "end_to_end.rst", "end-to-end throughput, {model}",
           OF_RUNS, per_model=True),
    Figure("contributions", "contributions", "table", "end_to_end", "contributions.rst",
           "what the parts of LoRAFusion add, {model}", OF_RUNS, per_model=True, shown=FORMATS,
           lacking=_contributions_lack),
    Figure("system_profile", "profiles", "profiles", "end_to_end", "system_profile.rst",
           "what the GPU does with each system", shown=("png",)),
    Figure("tunings", "tunings", "tunings", "end_to_end", "tunings.rst", "capacities that were tried, {model}",
           per_model=True, shown=("png",)),
    Figure("validation", "validation", "table", "end_to_end", "validation.rst", "predicted and measured times"),
    Figure("lossless", "lossless", "curves", "end_to_end", "lossless.rst", "losses lying on each other",
           shown=("png",), category="Checks"),
    Figure("kernel_speed", "kernels", "table", "kernels", "kernels.rst", checks=OF_KERNELS),
    Figure("layer_speed", "kernels", "table", "kernels", "kernels.rst", checks=OF_KERNELS),
    Figure("dram_traffic", "kernels", "table", "kernels", "kernels.rst", checks=OF_KERNELS, setting="traffic"),
    Figure("roofline", "kernels", "table", "kernels", "kernels.rst", checks=OF_KERNELS, setting="traffic"),
    Figure("grid_speed", "grid", "table", "grid", "grid.rst", checks=OF_KERNELS),
    Figure("planner_bubble", "planner", "table", "planner", "planner.rst"),
    Figure("planner_fill", "planner", "table", "planner", "planner.rst"),
    Figure("planner_time", "planner", "table", "planner", "planner.rst"),
    Figure("steps_speed", "steps", "table", "steps", "steps.rst", checks=OF_STEPS),
    Figure("cost_fit", "costs", "table", "costs", "costs.rst"),
    Figure("steps_profile", "profiles", "profiles", "steps", "steps.rst"),
)}  # fmt: skip
