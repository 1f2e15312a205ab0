"""The table of figures: what each is drawn from, which checks must have passed first, and how the report shows it.

The command line, the workflow and the report read `FIGURES`, and know no figure by name. A new figure is a function
here and an entry of the table. Each function imports what draws its figure when it is called, so that reading the table
loads neither torch nor matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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

    make: takes the measurement table, or the paths of other sources, and the model if `per_model`; returns a `Drawing`.
        Its docstring is the help of the command line.
    source: a key of `SOURCES`, and the experiment whose results it is: end_to_end, kernels, planner or steps.
    label: the name in the report; may hold {model}.
    caption: a file of workflow/report.
    checks: the checks that must have passed.
    shown: the formats that the report shows, of `FORMATS`, all of which are written.
    lacking: the systems that the figure takes and that are not among those of a model's cells.
    setting: a field of the experiment's suite; where it is empty there is no such figure.
    """

    make: Callable[..., Drawing]
    source: Literal["table", "curves", "profiles", "tunings"]
    experiment: Literal["end_to_end", "kernels", "planner", "steps"]
    label: str
    caption: str
    checks: Sequence[str] = ()
    per_model: bool = False
    shown: Sequence[str] = ("png", "pdf")
    category: str = "Figures"
    lacking: Callable[[Iterable[str]], list[str]] = lambda systems: []
    setting: str = ""

    @property
    def help(self) -> str:
        return (self.make.__doc__ or "").strip()

    def draw(self, source: Any, stem: str | Path, model: str | None = None) -> list[Path]:
        """Write `stem`.csv, draw it, and write `stem`.pdf and .png; returns their paths.

        source: the measurement table, or the paths of the other sources. Raises `MeasurementError` where it lacks what
        the figure shows.
        """
        from lorafusion.lab.report.drawing import written

        return written(*self.make(source, *([model] if self.per_model else [])), stem)


def draw(
    name: str, files: Sequence[Path], stem: str | Path, model: str | None = None, checks: Path | None = None
) -> list[Path]:
    """Draw a figure from files, for the command line; returns the paths written.

    checks: the folder of the verdicts; by default `checks` beside the table. Raises `UserError` for a figure that is
    not in the table, a model or a number of files that do not fit it, and checks that have not passed.
    """
    one_of("figure", name, set(FIGURES), "figure")
    figure = FIGURES[name]
    if figure.per_model != (model is not None):
        raise UserError(f"figure {name}: --model: {'expected a model' if figure.per_model else 'it takes none'}")
    if checks and not figure.checks:
        raise UserError(f"figure {name}: --checks: it rests on none")
    if figure.source in ("table", "curves") and len(files) != 1:
        raise UserError(f"figure {name}: expected one file, {SOURCES[figure.source]}; found {len(files)}")
    source: Any = files
    if figure.source == "table":
        source = _table(files[0], checks, figure.checks)
    return figure.draw(source, stem, model)


def _table(path: Path, folder: Path | None, checks: Sequence[str]) -> pd.DataFrame:
    from lorafusion.lab.checks.requirements import checked_table
    from lorafusion.lab.table.table import read

    return checked_table(path, folder, checks) if checks else read(path)


def _end_to_end(table: pd.DataFrame, model: str) -> Drawing:
    """Throughput of the systems on one model, by workload and number of GPUs."""
    from lorafusion.lab.report.figures import end_to_end

    return end_to_end.end_to_end_data(table, model), end_to_end.draw_end_to_end


def _contributions(table: pd.DataFrame, model: str) -> Drawing:
    """The speedup over the best baseline, and what schedule, packing and kernels add to it."""
    from lorafusion.lab.report.figures import contributions

    return contributions.contributions_data(table, model), contributions.draw


def _contributions_lack(systems: Iterable[str]) -> list[str]:
    from lorafusion.lab.report.ratios import lacking

    return lacking(systems)


def _kernel_speed(table: pd.DataFrame) -> Drawing:
    """Time of LoRA linears over the frozen one's, by tokens."""
    from lorafusion.lab.report.figures import kernels

    return kernels.kernel_speed_data(table), kernels.draw_kernel_speed


def _layer_speed(table: pd.DataFrame) -> Drawing:
    """Time and memory of decoder layers, by model and tokens."""
    from lorafusion.lab.report.figures import kernels

    return kernels.layer_speed_data(table), kernels.draw_layer_speed


def _dram_traffic(table: pd.DataFrame) -> Drawing:
    """GiB that LoRA linears move, beside the published values."""
    from lorafusion.lab.report.figures import kernels

    return kernels.dram_traffic_data(table), kernels.draw_dram_traffic


def _roofline(table: pd.DataFrame) -> Drawing:
    """LoRA linears under the measured ceilings of the GPU."""
    from lorafusion.lab.report.figures import kernels

    return kernels.roofline_data(table), kernels.draw_roofline


def _planner_bubble(table: pd.DataFrame) -> Drawing:
    """Simulated bubble of every strategy, by workload and batch."""
    from lorafusion.lab.report.figures import planner

    return planner.bubble_data(table), planner.draw_bubble


def _planner_fill(table: pd.DataFrame) -> Drawing:
    """Microbatches of every strategy over their lower bound."""
    from lorafusion.lab.report.figures import planner

    return planner.fill_data(table), planner.draw_fill


def _planner_time(table: pd.DataFrame) -> Drawing:
    """Time that a plan takes, by its samples."""
    from lorafusion.lab.report.figures import planner

    return planner.time_data(table), planner.draw_times


def _steps_speed(table: pd.DataFrame) -> Drawing:
    """Tokens per second and memory of training steps, by bench and implementation."""
    from lorafusion.lab.report.figures import steps

    return steps.speed_data(table), steps.draw_speed


def _steps_profile(files: Sequence[Path]) -> Drawing:
    """What the time of training steps goes into: by implementation, or before and after a commit."""
    from lorafusion.lab.report.figures import profiles

    return profiles.steps_data(files), profiles.draw_steps


def _system_profile(files: Sequence[Path]) -> Drawing:
    """What a GPU does with each system: milliseconds for 1000 tokens by class of kernel."""
    from lorafusion.lab.report.figures import profiles

    return profiles.systems_data(files), profiles.draw_systems


def _tunings(files: Sequence[Path], model: str) -> Drawing:
    """The capacities that were tried for each system of a model, how fast they were, and which was taken."""
    from lorafusion.lab.report.figures import tunings

    return tunings.tunings_data(files, model), tunings.draw


def _lossless(curves: Sequence[Path]) -> Drawing:
    """Losses of adapters trained together, alone and with plain PEFT."""
    from lorafusion.lab.report.figures import lossless

    return lossless.lossless_data(curves[0]), lossless.draw


FIGURES = {
    "end_to_end": Figure(_end_to_end, "table", "end_to_end", "end-to-end throughput, {model}", "end_to_end.rst",
                         OF_RUNS, per_model=True),
    "contributions": Figure(_contributions, "table", "end_to_end", "what the parts of LoRAFusion add, {model}",
                            "contributions.rst", OF_RUNS, per_model=True, shown=FORMATS, lacking=_contributions_lack),
    "system_profile": Figure(_system_profile, "profiles", "end_to_end", "what the GPU does with each system",
                             "system_profile.rst", shown=("png",)),
    "tunings": Figure(_tunings, "tunings", "end_to_end", "capacities that were tried, {model}", "tunings.rst",
                      per_model=True, shown=("png",)),
    "lossless": Figure(_lossless, "curves", "end_to_end", "losses lying on each other", "lossless.rst",
                       shown=("png",), category="Checks"),
    "kernel_speed": Figure(_kernel_speed, "table", "kernels", "kernel_speed", "kernels.rst", OF_KERNELS),
    "layer_speed": Figure(_layer_speed, "table", "kernels", "layer_speed", "kernels.rst", OF_KERNELS),
    "dram_traffic": Figure(_dram_traffic, "table", "kernels", "dram_traffic", "kernels.rst", OF_KERNELS,
                           setting="traffic"),
    "roofline": Figure(_roofline, "table", "kernels", "roofline", "kernels.rst", OF_KERNELS, setting="traffic"),
    "planner_bubble": Figure(_planner_bubble, "table", "planner", "planner_bubble", "planner.rst"),
    "planner_fill": Figure(_planner_fill, "table", "planner", "planner_fill", "planner.rst"),
    "planner_time": Figure(_planner_time, "table", "planner", "planner_time", "planner.rst"),
    "steps_speed": Figure(_steps_speed, "table", "steps", "steps_speed", "steps.rst", OF_STEPS),
    "steps_profile": Figure(_steps_profile, "profiles", "steps", "steps_profile", "steps.rst"),
}  # fmt: skip
