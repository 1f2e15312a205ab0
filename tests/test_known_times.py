"""From times that are known to what a reader sees: result files, the table, and the figures' CSVs and drawn artists.

Every expected number is worked out here from the plans' own lists of microbatches, and not by the project's code.
"""

from __future__ import annotations

import math
import statistics

import matplotlib
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer

from lorafusion.lab.report import drawing, style
from lorafusion.lab.report.figures import contributions, end_to_end, validation
from tests.known_times import BASELINES, CAPACITY, DRIFT, FAILED, MEMORY, RATES, REPEATS, Run, Story

T_OF_SIX = 2.570582  # Student's t with 5 degrees of freedom, 97.5 %


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    return Story(tmp_path_factory.mktemp("known"))


WINDOWS = pytest.mark.parametrize("window", ["whole", "steady"])


# --- Result files and the table


@WINDOWS
def test_single_throughputs_are_tokens_over_the_clock(story, window):
    expected = {
        (system, workload, repeat): run.throughput(repeat, window)
        for (system, workload), run in story.runs.items()
        for repeat in REPEATS
        if (system, workload, repeat) != FAILED
    }
    assert story.values("throughput", window, "single") == pytest.approx(expected)


@WINDOWS
def test_medians_are_of_all_repeats_or_none(story, window):
    expected = {key: statistics.median(run.throughputs(window)) for key, run in story.finished().items()}
    assert story.values("throughput", window, "median") == pytest.approx(expected)
    rows = story.table[(story.table["statistic"] == "median") & (story.table["metric"] == "throughput")]
    failed = rows[(rows["system"] == FAILED[0]) & (rows["workload"] == FAILED[1])]
    assert failed["status"].tolist() == ["oom", "oom"]
    assert failed["value"].isna().all()
    # Six values: the smallest and the largest hold the median with 97 %.
    rows = rows[(rows["window"] == window) & (rows["status"] == "ok")].set_index(["system", "workload"])
    for key, run in story.finished().items():
        found = rows.loc[key]
        assert (found["ci_low"], found["ci_high"]) == pytest.approx(
            (min(run.throughputs(window)), max(run.throughputs(window)))
        )
        assert found["n"] == len(DRIFT)


def test_the_other_numbers_of_a_run_are_known_too(story):
    each = list(story.finished().items())
    assert story.values("time", "whole", "median") == pytest.approx(
        {key: statistics.median(map(run.seconds, REPEATS)) for key, run in each}
    )
    assert story.values("peak_memory", "whole", "median") == {
        key: MEMORY * max(length for _, length in run.sizes) for key, run in each
    }
    padded = {key: sum(length for _, length in run.sizes) for key, run in each}
    assert story.values("throughput_padded", "whole", "median") == pytest.approx(
        {key: padded[key] * statistics.median(1 / run.seconds(repeat) for repeat in REPEATS) for key, run in each}
    )
    assert padded["mlora", "xsum"] > 1.5 * story.runs["mlora", "xsum"].tokens
    assert story.values("fill", "whole", "median") == pytest.approx(
        {key: run.tokens / len(run.sizes) / CAPACITY[run.workload] for key, run in each}
    )


def test_time_is_in_the_passes_and_the_host_has_none(story):
    """By this clock time passes in the forward pass alone."""
    for metric in ("bubble", "host_idle", "neighbour_idle"):
        assert story.values(metric, "whole", "median") == pytest.approx(dict.fromkeys(story.finished(), 0.0))


def test_predicted_times_stand_beside_the_measured_ones(story):
    """In the table, in the figure's CSV and in its points."""
    predicted = story.values("time", "whole", "median", kind="simulated")
    medians = {key: statistics.median(map(run.seconds, REPEATS)) for key, run in story.finished().items()}
    assert medians.keys() <= predicted.keys()
    data = pd.read_csv(story.folder / "validation.csv").set_index(["system", "workload"])
    assert data["measured"].to_dict() == pytest.approx(medians)
    ratios = {key: predicted[key] / medians[key] for key in medians}
    assert data["ratio"].to_dict() == pytest.approx(ratios)
    [ax] = validation.draw_validation(drawing.read_data(story.folder / "validation.csv")).axes
    points = [line for line in ax.lines if line.get_linestyle() == "None"]
    drawn = {float(x): float(y) for line in points for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert sorted(drawn) == pytest.approx(sorted(medians.values()))
    assert [drawn[x] for x in sorted(drawn)] == pytest.approx([ratios[key] for key in sorted(medians, key=medians.get)])


def test_units_are_those_of_the_numbers(story):
    units = story.table.groupby("metric")["unit"].unique().map(list).to_dict()
    expected = {"fill": ["1"], "peak_memory": ["B"], "throughput": ["tok/s"], "throughput_padded": ["tok/s"],
                "time": ["s"]}  # fmt: skip
    assert {name: units[name] for name in expected} == expected


# --- Throughputs, drawn


@pytest.fixture(scope="module")
def drawn(story):
    """The figure of throughputs from its CSV, its panels by window, and the system of each colour by the legend."""
    figure = end_to_end.draw_end_to_end(drawing.read_data(story.folder / "end_to_end.csv"))
    with matplotlib.rc_context(style.PARAMETERS):
        FigureCanvasAgg(figure).draw()
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    handles = zip(names, legend.legend_handles, strict=True)
    colours = {to_hex(handle.get_facecolor()): name for name, handle in handles if name in RATES}
    assert set(colours.values()) == {"lorafusion", *BASELINES}
    return figure, dict(zip(("whole", "steady"), figure.axes, strict=True)), colours


def bars_of(drawn, window) -> dict[tuple[str, str], tuple[float, object]]:
    """The bars of a panel and their centres, by the colour of the system and the name under the group."""
    figure, panels, colours = drawn
    ax = panels[window]
    groups = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    bars = {}
    for bar in ax.patches:
        centre = bar.get_x() + bar.get_width() / 2
        key = (colours[to_hex(bar.get_facecolor())], groups[round(centre)])
        assert key not in bars
        assert bar.get_y() == 0
        bars[key] = (centre, bar)
    return bars


def drawn_runs(story) -> dict[tuple[str, str], Run]:
    return {key: run for key, run in story.finished().items() if key[0] in ("lorafusion", *BASELINES)}


@WINDOWS
def test_each_bar_is_as_high_as_its_systems_median(story, drawn, window):
    bars = bars_of(drawn, window)
    expected = {key: statistics.median(run.throughputs(window)) for key, run in drawn_runs(story).items()}
    assert {key: bar.get_height() for key, (_, bar) in bars.items()} == pytest.approx(expected)


@WINDOWS
def test_each_error_bar_is_its_bars_interval(story, drawn, window):
    ax = drawn[1][window]
    centres = {key: centre for key, (centre, _) in bars_of(drawn, window).items()}
    found = {}
    for container in ax.containers:
        if isinstance(container, ErrorbarContainer):
            ((x, low), (_, high)) = container.lines[2][0].get_segments()[0]
            [key] = [key for key, centre in centres.items() if centre == pytest.approx(x)]
            found[key] = (low, high)
    assert found.keys() == centres.keys()
    for key, run in drawn_runs(story).items():
        values = run.throughputs(window)
        assert found[key] == pytest.approx((min(values), max(values)))


@WINDOWS
def test_the_points_on_a_bar_are_its_repeats(story, drawn, window):
    ax = drawn[1][window]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "o"]
    for key, (centre, bar) in bars_of(drawn, window).items():
        on_it = [y for x, y in points if abs(x - centre) < bar.get_width() / 2]
        assert sorted(on_it) == pytest.approx(sorted(story.runs[key].throughputs(window)))


@WINDOWS
def test_texts_are_the_ratio_to_the_best_baseline_and_what_failed(story, drawn, window):
    """On WikiSum mLoRA, of which one repeat failed, would have been the best."""
    medians = {key: statistics.median(run.throughputs(window)) for key, run in story.runs.items()}
    assert max(BASELINES, key=lambda name: medians[name, "wikisum"]) == "mlora"
    expected = ["OOM"]
    for workload in CAPACITY:
        others = [medians[name, workload] for name in BASELINES if (name, workload) != FAILED[:2]]
        expected.append(f"{medians['lorafusion', workload] / max(others):.2f}×")
    texts = {text.get_text(): text for text in drawn[1][window].texts if hasattr(text, "xy")}
    assert sorted(texts) == sorted(expected)
    assert round(texts["OOM"].xy[0]) == list(CAPACITY).index("wikisum")


@WINDOWS
def test_the_axis_is_in_tokens_a_second(drawn, window):
    ax = drawn[1][window]
    assert ax.get_ylabel() == "tokens/s"
    assert ax.get_yscale() == "linear"
    assert ax.get_ylim()[0] == 0
    for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        assert float(label.get_text().replace(",", "")) == pytest.approx(tick)


@WINDOWS
def test_the_csv_of_throughputs_is_what_is_drawn(story, window):
    data = pd.read_csv(story.folder / "end_to_end.csv")
    data = data[data["window"] == window]
    bars = data[data["element"] == "bar"].set_index(["system", "group"])
    runs = drawn_runs(story)
    assert bars["value"].to_dict() == pytest.approx(
        {key: statistics.median(run.throughputs(window)) for key, run in runs.items()}
    )
    assert bars["ci_low"].to_dict() == pytest.approx({key: min(run.throughputs(window)) for key, run in runs.items()})
    assert bars["ci_high"].to_dict() == pytest.approx({key: max(run.throughputs(window)) for key, run in runs.items()})
    points = data[data["element"] == "point"].set_index(["system", "group", "repeat"])["value"].to_dict()
    assert points == pytest.approx(
        {(*key, repeat): run.throughput(repeat, window) for key, run in runs.items() for repeat in REPEATS}
    )


# --- What the parts add, drawn


def mean(values) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(map(math.log, values)))


class Parts:
    """The factors of a window by hand: ratios of throughputs of the same repeat."""

    def __init__(self, story: Story, window: str) -> None:
        self.story, self.window = story, window

    def ratios(self, above: str, below: str, workload: str) -> list[float]:
        one, other = (self.story.runs[name, workload] for name in (above, below))
        return [one.throughput(repeat, self.window) / other.throughput(repeat, self.window) for repeat in REPEATS]

    def best(self, workload: str) -> str:
        finished = [name for name in BASELINES if (name, workload) != FAILED[:2]]
        return max(
            finished, key=lambda name: statistics.median(self.story.runs[name, workload].throughputs(self.window))
        )

    def of(self, workload: str) -> dict[str, list[float]]:
        """Ratios by factor and repeat."""
        systems = {
            "speedup": ("lorafusion", self.best(workload)),
            "baseline": ("unfused-sequential", self.best(workload)),
            "schedule": ("mlora-paper-setting", "peft-bf16"),
            "schedule_and_packing": ("unfused-ours", "unfused-sequential"),
            "kernels": ("lorafusion", "unfused-ours"),
            "product": ("lorafusion", "unfused-sequential"),
        }
        found = {factor: self.ratios(*names, workload) for factor, names in systems.items()}
        both = zip(found["schedule_and_packing"], found["schedule"], strict=True)
        return found | {"packing": [whole / schedule for whole, schedule in both]}

    def over_all(self) -> dict[str, list[float]]:
        """Geometric means over the workloads, by factor and repeat."""
        xsum, wikisum = self.of("xsum"), self.of("wikisum")
        return {factor: list(map(mean, zip(xsum[factor], wikisum[factor], strict=True))) for factor in xsum}


def t_interval(values: list[float]) -> tuple[float, float]:
    logarithms = [math.log(value) for value in values]
    reach = T_OF_SIX * statistics.stdev(logarithms) / math.sqrt(6)
    middle = statistics.fmean(logarithms)
    return math.exp(middle - reach), math.exp(middle + reach)


@WINDOWS
def test_the_csv_of_contributions_is_paired_ratios_and_their_interval(story, window):
    data = pd.read_csv(story.folder / "contributions.csv")
    data = data[data["window"] == window].set_index(["workload", "factor"])
    parts = Parts(story, window)
    for workload in CAPACITY:
        for factor, ratios in parts.of(workload).items():
            row = data.loc[workload, factor]
            assert row["value"] == pytest.approx(mean(ratios)), factor
            assert (row["low"], row["high"], row["n"]) == pytest.approx((min(ratios), max(ratios), 6)), factor
    assert data.loc["wikisum", "padding"]["value"] != data.loc["wikisum", "padding"]["value"]  # mLoRA has none
    for factor, means in parts.over_all().items():
        row = data.loc["all", factor]
        assert row["value"] == pytest.approx(mean(means)), factor
        assert (row["low"], row["high"]) == pytest.approx(t_interval(means)), factor
        assert row["bounds"] == "interval"
    assert data.loc["xsum", "speedup"]["over"] == "mlora"
    assert data.loc["wikisum", "speedup"]["over"] == parts.best("wikisum") != "mlora"


@pytest.fixture(scope="module")
def parts_drawn(story):
    """The panels of the parts, by window."""
    figure = contributions.draw_contributions(drawing.read_data(story.folder / "contributions.csv"))
    with matplotlib.rc_context(style.PARAMETERS):
        FigureCanvasAgg(figure).draw()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    pairs = list(zip(labels, figure.legends[0].legend_handles, strict=True))
    # Those of the right panels, of LoRA's operations, are the last.
    colours = {to_hex(handle.get_facecolor()): label for label, handle in pairs[:4]}
    operations = {to_hex(handle.get_facecolor()): label for label, handle in pairs[4:6]}
    return dict(zip(("whole", "steady"), figure.axes[::2], strict=True)), colours, figure.axes[1::2], operations


@WINDOWS
def test_each_part_begins_where_the_one_before_ends(story, parts_drawn, window):
    ax, parts = parts_drawn[0][window], Parts(story, window)
    names = [label.get_text().partition("\n")[0] for label in ax.get_yticklabels()]
    places = dict(zip(names, ax.get_yticks(), strict=True))
    assert set(places) == {*CAPACITY, "all"}
    bars = {}
    for bar in ax.patches:
        y = bar.get_y() + bar.get_height() / 2
        workload = min(places, key=lambda name: abs(places[name] - y))
        part = parts_drawn[1][to_hex(bar.get_facecolor())].split()[0].replace("lorafusion", "speedup")
        bars[workload, part] = (y, bar.get_x(), bar.get_x() + bar.get_width())
    whiskers = {line.get_ydata()[0]: tuple(line.get_xdata()) for line in ax.lines if line.get_marker() == "|"}
    for workload in places:
        ratios = parts.over_all() if workload == "all" else parts.of(workload)
        value = {factor: mean(of_one) for factor, of_one in ratios.items()}
        begins = {"schedule": 1.0, "packing": value["schedule"], "kernels": value["schedule_and_packing"],
                  "speedup": 1 / value["baseline"]}  # fmt: skip
        for part, begin in begins.items():
            y, left, right = bars[workload, part]
            assert (left, right) == pytest.approx((begin, begin * value[part])), (workload, part)
            bounds = t_interval(ratios[part]) if workload == "all" else (min(ratios[part]), max(ratios[part]))
            assert whiskers[y] == pytest.approx(tuple(begin * bound for bound in bounds)), (workload, part)
    assert len(bars) == len(whiskers) == 12


@WINDOWS
def test_the_axis_of_the_parts_is_of_ratios(story, parts_drawn, window):
    ax = parts_drawn[0][window]
    assert ax.get_xscale() == "log"
    ticks = zip(parts_drawn[0]["steady"].get_xticks(), parts_drawn[0]["steady"].get_xticklabels(), strict=True)
    assert all(float(label.get_text()) == pytest.approx(tick) for tick, label in ticks)
    means = Parts(story, window).over_all()["speedup"]
    low, high = t_interval(means)
    assert f"{mean(means):.3f}× [{low:.3f}, {high:.3f}]" in [text.get_text() for text in ax.texts]


@WINDOWS
def test_each_corner_is_its_operation_under_its_order(story, parts_drawn, window):
    """Those of the systems that were run; a bar begins at zero."""
    _, _, panels, operations = parts_drawn
    ax, parts = panels[["whole", "steady"].index(window)], Parts(story, window)
    orders = dict(zip([one.get_text() for one in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    bars = {}
    for bar in ax.patches:
        y = bar.get_y() + bar.get_height() / 2
        order = min(orders, key=lambda name: abs(orders[name] - y))
        bars[operations[to_hex(bar.get_facecolor())], order] = (bar.get_x(), bar.get_width())
    means = parts.over_all()
    assert bars == {
        ("unfused LoRA", "sequential"): (0, 1),
        ("unfused LoRA", "our\norder"): (0, pytest.approx(mean(means["schedule_and_packing"]))),
        ("fused LoRA", "our\norder"): (0, pytest.approx(mean(means["product"]))),
    }
