"""Errors in tables, figures, the report and the documents."""

from __future__ import annotations

from tests.planted.plant import planted

WHOLE = "tests/lab/table/test_whole_tables.py"
SEALS = "tests/core/test_seals.py"
NUMBERS = "tests/numbers/test_numbers.py::test_every_number_of_a_document_is_that_of_its_table"
RECORD = "tests/lab/report/test_figures_of_record.py::test_a_figures_csv_is_what_its_table_gives"


@planted("lorafusion.core.seals:require_seal", caught_by=f"{SEALS}::test_a_table_that_was_cut_anywhere_is_refused")
def a_table_that_was_cut_is_read(original):
    """A seal is read and not compared with its table."""

    def require_seal(path):
        from lorafusion.core.seals import Seal

        return Seal(0, "")

    return require_seal


@planted("lorafusion.core.seals:require_seal", caught_by=f"{SEALS}::test_a_table_with_a_flipped_bit_is_refused")
def only_the_rows_of_a_table_are_counted(original):
    """A table with as many rows as were sealed passes, whatever they say."""

    def require_seal(path):
        from lorafusion.core.schema import UserError
        from lorafusion.core.seals import FORM, Seal, _rows, seal_path

        parsed = FORM.fullmatch(seal_path(path).read_text())
        if int(parsed[1]) != _rows(path):
            raise UserError(f"{path}: cut or edited")
        return Seal(int(parsed[1]), parsed[3], parsed[2] or "")

    return require_seal


@planted("lorafusion.lab.table.table:gaps", caught_by=f"{WHOLE}::test_measurements_needs_all_runs_or_to_be_told")
def missing_runs_are_not_told(original):
    """A table that lacks repeats is taken for a whole one."""
    return lambda table: ""


@planted(
    "lorafusion.lab.table.table:_require_own_summaries",
    caught_by=f"{WHOLE}::test_a_median_that_is_not_that_of_its_runs_is_refused",
)
def medians_are_believed(original):
    """A median need not be that of the runs that stand beside it."""
    return lambda table, source: None


@planted(
    "lorafusion.lab.table.table:median",
    caught_by=f"{WHOLE}::test_the_tables_of_record_are_whole_and_their_columns_tell_all_rows_apart[nvidia-h200/steps]",
)
def the_median_is_the_largest(original):
    """The largest repeat stands in place of the median."""
    return max


@planted(
    "lorafusion.lab.table.validation:PLACE",
    caught_by=f"{WHOLE}::test_cells_that_only_their_names_tell_apart_are_refused",
)
def merged_cells_share_their_key(original):
    """Merged q, k and v is no part of a row's key."""
    return tuple(name for name in original if name != "merged_qkv")


@planted(
    "lorafusion.lab.cell_result:description",
    caught_by=f"{WHOLE}::test_the_columns_of_a_suites_cells_tell_them_apart[h200]",
)
def a_run_does_not_say_that_it_is_merged(original):
    """The column for merged q, k and v is false in each run."""
    return lambda *arguments: original(*arguments) | {"merged_qkv": False}


@planted(
    "lorafusion.lab.report.pages:KEY_COLUMNS",
    caught_by=f"{WHOLE}::test_the_page_of_measurements_shows_what_tells_its_rows_apart",
)
def the_page_of_measurements_hides_what_is_merged(original):
    """Rows of the page of measurements cannot be told apart."""
    return [name for name in original if name != "merged_qkv"]


@planted("tests.numbers.documents:read", caught_by=f"{NUMBERS}[docs/results/end-to-end.md]")
def the_headline_is_larger_in_its_document(original):
    """docs/results/end-to-end.md says 1.334 where its table gives 1.134."""
    return lambda document: original(document).replace("1.134**", "1.334**")


@planted("tests.numbers.documents:read", caught_by=f"{NUMBERS}[README.md]")
def the_headline_is_larger_in_the_readme(original):
    """README.md says 1.53 where its table gives 1.13."""
    return lambda document: original(document).replace("1.13 times", "1.53 times")


@planted("tests.numbers.documents:read", caught_by=f"{NUMBERS}[docs/results/kernels.md]")
def a_document_has_a_number_of_its_own(original):
    """docs/results/kernels.md has a ratio more, which is in no table."""
    return lambda document: original(document) + "\nOn a B200 the same linear takes 1.04.\n"


@planted(
    "lorafusion.lab.table.statistics:geometric_mean_interval",
    caught_by=[
        f"{NUMBERS}[docs/results/end-to-end.md]",
        f"{RECORD}[nvidia-h200/end_to_end_contributions]",
    ],
)
def intervals_are_a_tenth(original):
    """The interval of a speedup is a tenth as wide."""

    def interval(values, *confidence):
        bounds = original(values, *confidence)
        if bounds is None:
            return None
        middle = (bounds[0] * bounds[1]) ** 0.5
        return tuple(middle * (bound / middle) ** 0.1 for bound in bounds)

    return interval


@planted(
    "lorafusion.lab.report.figures.end_to_end:end_to_end_data",
    caught_by=f"{RECORD}[nvidia-h200/end_to_end_throughput]",
)
def our_bars_are_two_percent_higher(original):
    """The figure of throughput shows 1.02 of what `lorafusion` has."""

    def data(table, model):
        rows = original(table, model)
        ours = rows["system"] == "lorafusion"
        return rows.assign(value=rows["value"].where(~ours, 1.02 * rows["value"]))

    return data


@planted("lorafusion.lab.report.figures.kernels:kernel_speed_data", caught_by=f"{RECORD}[nvidia-h200/kernel_speed]")
def our_linears_are_faster_in_their_figure(original):
    """The figure of linears shows 0.98 of what the fused ones take."""

    def data(table):
        rows = original(table)
        ours = rows["implementation"].str.startswith("fused")
        return rows.assign(value=rows["value"].where(~ours, 0.98 * rows["value"]))

    return data


@planted(
    "lorafusion.lab.checks.verdicts:validated",
    caught_by="tests/lab/report/test_checks_page.py::test_a_verdict_that_is_none_is_refused",
)
def a_verdict_is_believed(original):
    """A verdict that says passed is, however far its figures are beyond their limits."""
    return lambda model, data, source: original(model, data | {"limits": {}}, source)


@planted(
    "lorafusion.lab.checks.verdicts:read_verdict",
    caught_by="tests/lab/report/test_checks_page.py::test_a_verdict_that_is_none_is_refused",
)
def any_word_means_passed(original):
    """A verdict whose `passed` is a word is taken for one that passed."""

    def read_verdict(path):
        import json

        from lorafusion.lab.checks.verdicts import Verdict

        data = json.loads(path.read_text())
        data.pop("seal", None)
        return Verdict.model_validate(data, strict=False)

    return read_verdict
