"""The command line as a user meets it: files in, files out, and one line for a mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib.metadata import version
from unittest.mock import patch

import pytest
from peft import LoraConfig
from transformers import LlamaConfig

from lorafusion.cli.main import main
from lorafusion.core.config import CONFIGS
from lorafusion.core.machine import has_gpu
from lorafusion.core.workload import Workload

XSUM = str(CONFIGS / "workloads" / "xsum.yaml")


def lorafusion(*arguments) -> subprocess.CompletedProcess:
    """What the program does when it is called so, in this process: the imports of a new one would take most of the
    time."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    command = ["lorafusion", *map(str, arguments)]
    with (
        patch.dict(os.environ),
        patch.object(sys, "argv", command),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A workload and its plan for two stages."""
    folder = tmp_path_factory.mktemp("planned")
    made = lorafusion("workload", XSUM, "--samples", 16, "--length-scale", 16, "-o", folder / "deep" / "w.json")
    assert made.returncode == 0, made.stderr
    done = lorafusion("plan", folder / "deep/w.json", "--stages", 2, "--capacity", 256, "-o", folder / "p.json")
    assert done.returncode == 0, done.stderr
    assert "microbatches" in done.stdout
    (folder / "costs.yaml").write_text("layers: [1, 1, 1]\ntoken: 1.0\n")
    return folder


def test_showing_a_plan(planned):
    """Statistics and chart in the terminal, a picture, a page and a trace; with the costs of a model, in seconds."""
    chart, page, trace = (planned / name for name in ("chart.png", "page.html", "trace.json"))
    done = lorafusion(
        "plan", "show", planned / "p.json", "--workload", planned / "deep/w.json", "--model", "llama-3.1-8b",
        "-o", chart, "--trace", trace,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bubble, steady" in done.stdout
    assert "stage 1" in done.stdout
    assert chart.read_bytes()[:4] == b"\x89PNG"
    assert json.loads(trace.read_text())["traceEvents"]
    assert lorafusion("plan", "show", planned / "p.json", "-o", page).returncode == 0
    assert "<svg" in page.read_text()


def test_a_strategy_by_name_and_replicas(planned):
    done = lorafusion(
        "plan", planned / "deep/w.json", "--strategy", "fewest", "--data-parallel", 2, "--capacity", 256,
        "-o", planned / "two.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((planned / "two.json").read_text())["data_parallel"] == 2


def test_a_plan_in_which_jobs_end_early(planned):
    done = lorafusion(
        "plan", planned / "deep/w.json", "--aim", "completion", "--capacity", 256, "-o", planned / "e.json"
    )
    assert done.returncode == 0, done.stderr
    shown = lorafusion("plan", "show", planned / "e.json", "--workload", planned / "deep/w.json").stdout
    shares = [
        float(re.search(r"jobs end +after ([\d.]+)%", text)[1])
        for text in (shown, lorafusion("plan", "show", planned / "p.json").stdout)
    ]
    assert shares[0] < shares[1]


def test_a_plan_with_graphs_shows_its_buckets(planned):
    done = lorafusion("plan", planned / "deep/w.json", "--graphs", "--capacity", 256, "-o", planned / "g.json")
    assert done.returncode == 0, done.stderr
    sizes = [bucket["tokens"] for bucket in json.loads((planned / "g.json").read_text())["buckets"]]
    shown = lorafusion("plan", "show", planned / "g.json", "--workload", planned / "deep/w.json").stdout
    assert re.search(rf"buckets +{', '.join(map(str, sizes))} tokens; [\d.]+% of padding", shown)
    assert "buckets" not in lorafusion("plan", "show", planned / "p.json").stdout


def test_a_plan_by_the_costs_of_a_model(planned):
    done = lorafusion(
        "plan", planned / "deep/w.json", "--model", "llama-3.1-8b", "--stages", 2, "--capacity", 256,
        "-o", planned / "m.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((planned / "m.json").read_text())["system"] == "lorafusion"


def test_a_proposal_names_divisions_of_the_gpus_and_the_command_that_follows(planned):
    out, trace = planned / "proposal.json", planned / "best.json"
    done = lorafusion("plan", "propose", planned / "deep/w.json", "--model", "llama-3.1-70b", "--gpus", 2,
                      "--memory", 100, "--out", out, "--trace", trace)  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, row, failed, perfetto, best, command = done.stdout.splitlines()
    assert row.split()[:6] == ["1", "1", "2", "1", "1", "0"]
    assert failed == "1 stage: the weights do not fit: 131.4 GiB"
    assert "best.json: open it" in perfetto
    assert re.match(
        r"best: 1 group of 2 x 1 GPUs, 0 of 2 idle; [\d,]+ tokens/s, [\d.]+ s, 0.0*[1-9]\d? GPU-hours", best
    )
    data = json.loads(out.read_text())
    assert [choice["stages"] for choice in data["choices"]] == [2, 1]
    assert data["groups"][0]["jobs"] == [job.name for job in Workload.read(planned / "deep/w.json").jobs]
    assert {event["tid"] for event in json.loads(trace.read_text())["traceEvents"]} == {0, 1}
    followed = lorafusion(*shlex.split(command.removeprefix("next: lorafusion "))[:-1], planned / "followed.json")
    assert followed.returncode == 0, followed.stderr


def test_each_group_of_a_proposal_has_a_file(planned):
    """Of a workload, and of a jobs file, whose groups are jobs files that together have its jobs and settings."""
    folder = planned / "groups"
    arguments = ("--memory", 20, "--gpus", 4, "--write", folder)
    done = lorafusion("plan", "propose", planned / "deep/w.json", "--model", "llama-3.1-8b", *arguments)
    assert done.returncode == 0, done.stderr
    parts = [Workload.read(path) for path in sorted(folder.iterdir())]
    whole = Workload.read(planned / "deep/w.json")
    assert sorted((job for part in parts for job in part.jobs), key=lambda job: job.name) == sorted(
        whole.jobs, key=lambda job: job.name
    )
    again = lorafusion("plan", "propose", planned / "deep/w.json", "--model", "llama-3.1-8b", *arguments)
    assert again.returncode == 2
    assert "expected a new or an empty folder" in again.stderr


def test_an_empty_folder_that_cannot_be_written_to_is_refused_before_anything_is_simulated(
    planned, tmp_path, monkeypatch
):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path or not mode & os.W_OK)
    done = lorafusion("plan", "propose", planned / "deep/w.json", "--model", "tiny", "--gpus", 1, "--write", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot be written (no permission in {tmp_path})" in done.stderr


MISTAKES = {
    "unknown system": (["plan", "{folder}/deep/w.json", "--system", "x", "-o", "{folder}/x"], "unknown system 'x'"),
    "missing file": (["plan", "{folder}/none.json", "-o", "{folder}/x"], "none.json: no such workload file"),
    "sample too long": (
        ["plan", "{folder}/deep/w.json", "--capacity", "20", "-o", "{folder}/x"],
        "more than the capacity of 20",
    ),
    "an unknown system": (
        ["plan", "{folder}/deep/w.json", "--system", "megatron", "-o", "{folder}/x"],
        "--system: unknown system 'megatron'; known: fused-mlora, fused-sequential, grouped-mm, lorafusion",
    ),
    "a plan for a workload": (["plan", "{folder}/p.json", "-o", "{folder}/x"], "p.json: "),
    "unknown strategy": (
        ["plan", "{folder}/deep/w.json", "--strategy", "best", "-o", "{folder}/x"],
        "plan: unknown strategy 'best'; known: fast, fewest, ffd, mlora, paper, sequential",
    ),
    "costs that are not looked at": (
        ["plan", "{folder}/deep/w.json", "--strategy", "paper", "--model", "tiny", "-o", "{folder}/x"],
        "paper does not plan by costs; fast does",
    ),
    "costs of a system without them": (
        ["plan", "{folder}/deep/w.json", "--system", "mlora", "--model", "tiny", "-o", "{folder}/x"],
        "mlora does not plan by costs; fast does",
    ),
    "system and strategy": (
        ["plan", "{folder}/deep/w.json", "--system", "mlora", "--strategy", "fast", "-o", "{folder}/x"],
        "either --system or --strategy, found mlora and fast",
    ),
    "costs of other stages": (
        ["plan", "{folder}/deep/w.json", "--costs", "{folder}/costs.yaml", "--stages", "2", "-o", "{folder}/x"],
        "costs.yaml: 3 stages, expected 2",
    ),
    "costs without samples": (["plan", "show", "{folder}/p.json", "--model", "tiny"], "need the plan's workload"),
    "unknown chart": (["plan", "show", "{folder}/p.json", "-o", "{folder}/x.gif"], "unknown form of chart '.gif'"),
    "a proposal without a model": (
        ["plan", "propose", "{folder}/deep/w.json", "--gpus", "1"],
        "--model: expected the base",
    ),
    "costs of other layers": (
        ["plan", "propose", "{folder}/deep/w.json", "--model", "tiny", "--gpus", "1", "--costs", "{folder}/costs.yaml"],
        "costs.yaml: layers: 3 of all stages, but tiny has ",
    ),
    "nothing fits": (
        ["plan", "propose", "{folder}/deep/w.json", "--model", "llama-3.1-70b", "--gpus", "1"],
        "1 GPUs of 80 GiB: nothing fits",
    ),
    "an aim of another planner": (
        ["plan", "{folder}/deep/w.json", "--system", "mlora", "--aim", "completion", "-o", "{folder}/x"],
        "--aim: mlora has none; fast does",
    ),
    "graphs of a strategy": (
        ["plan", "{folder}/deep/w.json", "--strategy", "fast", "--graphs", "-o", "{folder}/x"],
        "--graphs: expected a system, found the strategy fast",
    ),
    "graphs of a system without": (
        ["plan", "{folder}/deep/w.json", "--system", "mlora", "--graphs", "-o", "{folder}/x"],
        "plan: system mlora has no graphs, its loop asks the host where the tokens of each adapter lie",
    ),
    "an unknown aim": (
        ["plan", "{folder}/deep/w.json", "--aim", "sooner", "-o", "{folder}/x"],
        "plan: unknown aim 'sooner'; known: completion, throughput",
    ),
    "zero stages": (["plan", "{folder}/deep/w.json", "--stages", "0", "-o", "{folder}/x"], "--stages"),
    "no such command": (["dance"], "No such command 'dance' (see lorafusion --help)"),
    "no file": (["train"], "Missing argument 'jobs' (see lorafusion train --help)"),
    "an unknown workload": (["workload", "c4", "-o", "{folder}/x"], "unknown workload 'c4'; known: cnn_dailymail"),
    "loud and quiet": (["--verbose", "--quiet", "train", "{folder}/none.yaml"], "found both"),
    "no adapter": (["patch", "{folder}"], "no adapter_config.json"),
    **{
        f"a scale of {value}": (
            ["workload", XSUM, "--length-scale", value, "-o", "{folder}/x"],
            f"than or equal to {limit} (found '{value}') (see lorafusion workload --help)",
        )
        for value, limit in (
            ("0", "0.01"),
            ("-1", "0.01"),
            ("nan", "1000000"),
            ("inf", "1000000"),
            ("1e300", "1000000"),
        )
    },
    "too many samples": (["workload", XSUM, "--samples", "1000000000000", "-o", "{folder}/x"], "--samples"),
    "a seed beyond the adapters'": (["workload", XSUM, "--seed", "4294967295", "-o", "{folder}/x"], "--seed"),
    "no number of memory": (
        ["plan", "propose", "{folder}/deep/w.json", "--model", "tiny", "--gpus", "1", "--memory", "nan"],
        "--memory",
    ),
    "no such step": (["lab", "run", "smoke", "--step", "{folder}/x"], "x: no step of smoke writes it"),
    "no such suite": (["lab", "list", "smok"], "known suites: cpu-tiny, h200, h200-prompts, h200x2, paper-grid, smoke"),
    "no such figure": (["lab", "figure", "smoke", "bars"], "lab figure: unknown figure 'bars'; known: contributions"),
    "no such check": (["lab", "check", "smoke", "plan"], "lab check: unknown check 'plan'; known: gradients"),
    "files without an output": (["lab", "measure", "smoke", "end_to_end", "x"], "FILES and --out: expected both"),
    "no results": (["lab", "report", "paper-grid"], ": the report needs it; run `lorafusion lab run configs"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_is_one_line_and_status_2(planned, name):
    arguments, message = MISTAKES[name]
    done = lorafusion(*(argument.format(folder=planned) for argument in arguments))
    assert done.returncode == 2, done.stdout + done.stderr
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert message in done.stderr.splitlines()[0]
    assert not (planned / "x").exists()


@pytest.mark.parametrize(("command", "package"), [("lab list smoke", "pandas"), ("reproduce", "snakemake")])
def test_the_laboratory_says_which_extra_it_needs(monkeypatch, command, package):
    monkeypatch.setitem(sys.modules, package, None)
    done = lorafusion(*command.split())
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith("error: ")) == (2, True)
    assert line.endswith(f": needs the package {package}: pip install 'lorafusion[lab]'")


@pytest.mark.parametrize("command", ["reproduce", "lab run smoke", "lab report smoke"])
def test_the_workflow_needs_a_checkout(monkeypatch, command):
    monkeypatch.setattr("lorafusion.lab.reproduce.IS_CHECKOUT", False)
    done = lorafusion(*command.split())
    message = "error: the workflow: needs a checkout of the repository, which has its Snakefile\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_a_group_without_a_command_shows_its_help():
    done = lorafusion("plan")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: lorafusion plan ")


def test_it_says_its_version():
    assert lorafusion("--version").stdout == f"lorafusion {version('lorafusion')}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_its_commands(shell, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, shell))
    done = lorafusion("--show-completion")
    assert (done.returncode, "LORAFUSION" in done.stdout.upper()) == (0, True)


def test_what_the_kernels_do_for_an_adapter(tmp_path):
    LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, vocab_size=64, architectures=["LlamaForCausalLM"]).save_pretrained(
        tmp_path / "base")  # fmt: skip
    LoraConfig(base_model_name_or_path=str(tmp_path / "base"), target_modules=["q_proj", "k_proj", "embed_tokens"]
               ).save_pretrained(tmp_path / "adapter")  # fmt: skip
    done = lorafusion("patch", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert "4 LoRA linears patched, 4 of them in 2 groups" in done.stdout
    assert "1 x peft.tuners.lora.layer.Embedding is no plain LoRA linear" in done.stdout


def test_it_is_a_program(tmp_path):
    command = [sys.executable, "-m", "lorafusion.cli.main", "plan", tmp_path / "none.json", "-o", tmp_path / "x"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/none.json: no such workload file\n"


@pytest.mark.parametrize(("closed", "call", "status"), [
    ("2>&-", f"workload {XSUM} --samples 4 -o w.json", 0),
    (">&- 2>&-", f"workload {XSUM} --samples 4 -o w.json", 0),
    ("<&- >&- 2>&-", "plan none.json -o x", 2),
])  # fmt: skip
def test_standard_streams_may_be_closed(tmp_path, closed, call, status):
    """The status was 120, and what was said to standard error stood in a file that was open."""
    command = f"{shlex.quote(sys.executable)} -m lorafusion.cli.main {call} {closed}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, shell=True, cwd=tmp_path, env=environment).returncode == status
    assert [path.name for path in tmp_path.iterdir()] == ["w.json"] * (not status)


def test_what_is_started_runs_no_file_of_the_folder(tmp_path, monkeypatch):
    """A queue.py beside the jobs file was run in place of Python's own."""
    (tmp_path / "this.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ), patch.object(sys, "argv", ["lorafusion", "--version"]), suppress(SystemExit):
        try:
            main()
        finally:
            started = os.environ.copy()
    assert not subprocess.run([sys.executable, "-m", "this"], env=started, stdout=subprocess.DEVNULL).returncode


@pytest.mark.parametrize(
    "call",
    [
        "--help",
        "plan jobs.yaml -o x",
        "train jobs.yaml",
        "lab list jobs.yaml",
        "workload jobs.yaml -o x",
        "plan jobs.yaml --stages 0 -o x",
        "patch none",
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(tmp_path, call):
    (tmp_path / "jobs.yaml").write_text("modle: tiny\n")
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        "from lorafusion.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, *call.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0 if call == "--help" else 2, "False")


def test_planning_needs_no_torch(planned):
    """Plans are made in seconds on any machine: nothing on that path imports torch."""
    code = (
        "import sys, lorafusion.planning.fast, lorafusion.planning.paper, baselines.mlora.planner, "
        "lorafusion.data.lengths, lorafusion.core.config, lorafusion.planning.sequential, "
        "lorafusion.planning.simulator.trace; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_a_gpu_suite_without_a_gpu_is_refused(tmp_path):
    done = lorafusion("lab", "run", "h200", "--step", tmp_path / "checks" / "learning.json")
    assert done.returncode == 2
    assert "a suite for GPUs, but nvidia-smi finds none" in done.stderr
