"""The summary in the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorafusion.lab.report import style
from lorafusion.lab.report.summary import print_summary

PAPERS = ("peft", "megatron-fsdp", "megatron-pp", "mlora", "lorafusion")


@pytest.fixture
def printed(make_table):
    """What is printed for runs, by default into a file, which is no terminal and 80 columns wide."""

    def text(runs, **console) -> str:
        stream = io.StringIO()
        print_summary(make_table(runs), "results/smoke/report.html", Console(file=stream, width=80, **console))
        return stream.getvalue()

    return text


def row_of(text: str, *words: str) -> list[str]:
    (line,) = [line.split() for line in text.splitlines() if line.split()[: len(words)] == list(words)]
    return line


def test_medians_by_workload_and_processes(printed, smoke_runs):
    text = printed(smoke_runs)
    assert text.startswith("smoke, tiny: tokens/s, whole run, median (CPU, not a performance result)\n")
    assert row_of(text, "xsum", "1") == ["xsum", "1", "OOM", "914", "1,114", "1,444"]
    assert row_of(text, "xsum", "2") == ["xsum", "2", "timeout", "2,874"]
    assert row_of(text, "heterogeneous", "4") == ["heterogeneous", "4", "4,424", "5,744"]
    assert text.rstrip().endswith("report: results/smoke/report.html")


def test_the_frozen_model_is_a_system_beside_the_others(printed, smoke_runs):
    """It is not the best, for it trains nothing."""
    frozen = {"metric": "frozen_throughput", "value": 2000.0, "unit": "tok/s", "direction": "higher", "window": "whole"}
    for run in smoke_runs:
        if run["cell"]["system"] == "lorafusion" and run["cell"]["gpus"] == 1:
            run["metrics"].append(frozen)
    assert row_of(printed(smoke_runs), "xsum", "1")[-2:] == ["1,444", "2,000"]
    row = next(line for line in printed(smoke_runs, force_terminal=True, no_color=True).splitlines() if "1,444" in line)
    assert row.count("\x1b[1m") == 1
    assert row.index("\x1b[1m") < row.index("1,444") < row.index("2,000")


def test_failed_cells_are_listed_with_their_files(printed, smoke_runs):
    lines = printed(smoke_runs).splitlines()
    start = lines.index("3 failed cells:")
    listed = "\n".join(lines[start:])
    assert "- model~tiny/workload~xsum/gpus~1/batch~8/system~peft: OOM in 2 of 2 repeats: it went wrong" in listed
    assert "- model~tiny/workload~xsum/gpus~2/batch~8/system~mlora: timeout in 1 of 2 repeats" in listed
    assert "  result: results/peft-xsum-1.json\n  log: logs/peft-1.log" in listed


def test_fits_80_columns_with_the_papers_systems_and_every_kind(printed, make_run):
    runs = [make_run(system, workload, gpu="NVIDIA H200") for system in PAPERS for workload in style.WORKLOADS]
    runs += [make_run("lorafusion", "heterogeneous", 8, kind="simulated", speed=123456.0)]
    text = printed(runs)
    assert max(map(len, text.splitlines())) <= 80
    assert "GPUs" in text
    assert "CPU" not in text
    assert row_of(text, "heterogeneous", "simulated")[-1] == "987,668"
    workloads = [line.split()[0] for line in text.splitlines() if line.split()[1:2] == ["measured"]]
    assert workloads == list(style.WORKLOADS)


def test_no_colours_outside_a_terminal_and_some_in_one(printed, make_run):
    runs = [make_run(), make_run("mlora", status="oom")]
    assert "\x1b" not in printed(runs)
    assert "\x1b[31m" in printed(runs, force_terminal=True, color_system="standard")


def test_paths_are_printed_whole_and_as_they_are(make_run, make_table):
    stream = io.StringIO()
    path = "results/" + "long/" * 30 + "[red]report.html"
    print_summary(make_table([make_run()]), path, Console(file=stream, width=80))
    assert f"report: {path}\n" in stream.getvalue()


def test_a_table_without_throughput_says_so(make_run, make_table):
    table = make_table([make_run()])
    stream = io.StringIO()
    print_summary(table[table["metric"] == "time"], "report.html", Console(file=stream))
    assert stream.getvalue() == "no throughput in the table\nreport: report.html\n"


def test_runs_beside_others_are_counted(make_table, smoke_runs):
    table, stream = make_table(smoke_runs), io.StringIO()
    runs = table[(table["statistic"] == "single") & (table["status"] == "ok")]
    table.loc[runs.index[:1], "note"] = "mean of 2; beside other Slurm jobs (8 of alice: 2 CPUs, N/A)"
    print_summary(table, "report.html", Console(file=stream, width=80))
    count = len(table[table["statistic"] == "single"].drop_duplicates(["kind", "cell", "repeat"]))
    expected = f"1 of {count} runs were measured beside others, as {runs.iloc[0]['cell']}, "
    assert f"{expected}beside other Slurm jobs (8 of alice: 2 CPUs, N/A)\n" in stream.getvalue()
