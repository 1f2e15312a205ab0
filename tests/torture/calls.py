"""Hostile calls: options that a command cannot have, outputs that cannot be written, names and environments."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.torture import valid
from tests.torture.case import Case

PLAN, WORKLOAD = valid.text(valid.plan()), valid.workload().to_json().encode()
FILES = {"plan.json": PLAN, "workload.json": WORKLOAD, "suite.yaml": valid.SUITE, "costs.yaml": valid.COSTS}
SYNTHETIC = re.sub(rb"  - name: first\n(    .*\n)*|tokenizer: .*\n", b"", valid.JOBS)
EITHER = frozenset({0, 2})
DONE = frozenset({0})
LONG = "x" * 100_000
NUMBERS = ("", "word", "-1", "0", "1.5", "1e3", "nan", "inf", "1" + "0" * 30, "0x10", "--", LONG)
FLOATS = ("", "word", "nan", "inf", "-inf", "-1", "0", "1e999", "1e-300")
CHOICES = ("", "torture", "../x", "a b", "\x1b[31m", LONG, "é", "*")

# An option's place in a line that is right but for it, and the values that are tried there.
OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "workload config": ("workload {} -o out.json", (*CHOICES, "nowhere.yaml", "/dev/null", ".")),
    "workload samples": ("workload xsum --samples {} -o out.json", NUMBERS),
    "workload batch": ("workload xsum --global-batch {} -o out.json", NUMBERS),
    "workload scale": ("workload xsum --samples 4 --length-scale {} -o out.json", (*FLOATS, "1e-30", "1e30")),
    "workload seed": ("workload xsum --samples 4 --seed {} -o out.json", (*NUMBERS[:3], *NUMBERS[4:], "4294967296")),
    "plan system": ("plan make workload.json --system {} -o out.json", CHOICES),
    "plan strategy": ("plan make workload.json --strategy {} -o out.json", CHOICES),
    "plan stages": ("plan make workload.json --stages {} -o out.json", NUMBERS),
    "plan capacity": ("plan make workload.json --capacity {} -o out.json", (*NUMBERS, "1")),
    "plan replicas": ("plan make workload.json --data-parallel {} -o out.json", NUMBERS),
    "plan model": ("plan make workload.json --model {} -o out.json", CHOICES),
    "show model": ("plan show plan.json --model {}", CHOICES),
    "show schedule": ("plan show plan.json --schedule {}", CHOICES),
    "show first": ("plan show plan.json --first {}", (*NUMBERS[:3], *NUMBERS[4:], "100000")),
    "show count": ("plan show plan.json --count {}", NUMBERS),
    "show form": ("plan show plan.json --out {}", ("out.exe", "out", "out.jpeg", "out.PNG.gz")),
    "propose model": ("plan propose workload.json --gpus 2 --model {}", CHOICES),
    "propose gpus": ("plan propose workload.json --model tiny --gpus {}", NUMBERS),
    "propose memory": ("plan propose workload.json --model tiny --gpus 2 --memory {}", FLOATS),
    "propose node": ("plan propose workload.json --model tiny --gpus 2 --gpus-per-node {}", NUMBERS),
    "propose prefer": ("plan propose workload.json --model tiny --gpus 2 --prefer {}",
                       (*CHOICES, "Throughput", "gpu_hours", "gpu-hours,throughput", "0")),
    "propose network": ("plan propose workload.json --model tiny --gpus 2 --network {}", FLOATS),
    "propose costs": ("plan propose workload.json --model tiny --gpus 2 --costs {}",
                      ("", "nowhere.yaml", ".", "/dev/null", "plan.json", "x" * 300, "\x1b[31m")),
    "propose groups": ("plan propose workload.json --model tiny --gpus 2 --write {}",
                       ("", ".", "/", "/dev/null", "plan.json", "plan.json/x", "x" * 300, "/proc/groups", "..")),
    "list suite": ("lab list {}", (*CHOICES, "x.yaml", "/dev/null", ".", "..", "smoke.yaml", "SMOKE")),
    "list pattern": ("lab list suite.yaml {}", ("", "torture", "[", "\x1b[31m", LONG)),
    "list folder": ("lab list suite.yaml --folder {}", ("suite.yaml", "/dev/null", "suite.yaml/x", "x" * 300, "{x}",
                                                          "a\nb")),
    "run suite": ("lab run {}", CHOICES),
    "run step": ("lab run suite.yaml --step {}", ("", "torture", "/", ".", "..", "x" * 300, "runs/torture.json")),
    "run share": ("lab run suite.yaml --here --share {}", ("", "1", "1/0", "2/2", "-1/2", "a/b", "0/1/2", "0/-1",
                                                           "1/1e3",
                                                      "0/" + "9" * 5000)),
    "run seconds": ("lab run suite.yaml --here --seconds {}", ("", "word", "nan", "-1", "-inf")),
    "run only": ("lab run suite.yaml --here --only {}", ("", "torture", "[")),
    "measure suite": ("lab measure {}", CHOICES),
    "measure table": ("lab measure suite.yaml {}", CHOICES[1:]),
    "figure suite": ("lab figure {}", CHOICES),
    "figure name": ("lab figure suite.yaml {}", CHOICES[1:]),
    "figure model": ("lab figure smoke end_to_end t.csv --out f --model {}", CHOICES),
    "profile-costs suite": ("lab profile-costs {}", CHOICES),
    "profile-costs seconds": ("lab profile-costs suite.yaml --seconds {}", ("", "word", "nan", "-1", "-inf")),
    "validate suite": ("lab validate {}", CHOICES),
    "validate table": ("lab validate suite.yaml {}", CHOICES[1:]),
    "check suite": ("lab check {}", CHOICES),
    "check name": ("lab check suite.yaml {}", CHOICES[1:]),
    "check system": ("lab check suite.yaml systems --out out.json --system {}", CHOICES),
    "check arrangement": ("lab check suite.yaml lossless --out out.json --arrangement {}",
                          ("", "word", "1", "0x1", "1x0", "-1x1", "1x1+torture", "1000000x1", "9" * 5000 + "x1")),
    "contract record": ("lab contract {}", ("", "nowhere.json", ".", "/dev/null", "x" * 300)),
    "contract device": ("lab contract plan.json --device {}", ("", "torture", "cuda:0", "CPU")),
    "report suite": ("lab report {}", CHOICES),
    "preflight suite": ("lab preflight {}", CHOICES),
    "publish suite": ("lab publish {}", CHOICES),
    "publish mode": ("lab publish smoke t.csv --out d --mode {}", ("", "torture", "ONLINE")),
    "tree-hash commit": ("lab tree-hash {}", ("", "torture", "-x", "--all", "--output=PWNED", "$(touch PWNED)",
                                              "HEAD:", "a b",
                                              "\x1b[31m", LONG, "HEAD~100000")),
    "reproduce suite": ("reproduce {}", (*CHOICES, "x$(touch PWNED).yaml")),
    "patch adapter": ("patch {}", ("", "nowhere", ".", "/dev/null", "plan.json", "../..", "\x1b[31m", "x" * 300)),
    "train jobs": ("train {}", ("", "nowhere.yaml", ".", "/", "/dev/null", "x" * 300, "plan.json", "\x1b[31m")),
    "plan file": ("plan {} -o out.json", ("", "nowhere.json", ".", "/dev/null", "x" * 300, "\x1b[31m.json")),
    "show file": ("plan show {}", ("", "nowhere.json", ".", "/dev/null", "x" * 300, "workload.json")),
    "propose file": ("plan propose {} --model tiny --gpus 2", ("", "nowhere.json", ".", "/dev/null", "plan.json")),
}  # fmt: skip
# Lines that are wrong as a whole.
LINES = (
    "torture", "--torture", "--verbose --quiet lab tree-hash", "train", "train a b", "train jobs.yaml --torture",
    "patch",
    "workload", "workload xsum", "plan", "plan make", "plan make workload.json", "plan show",
    "plan propose workload.json", "plan propose workload.json --gpus 2", "plan propose workload.json --model tiny",
    "plan make workload.json -o out.json --system lorafusion --strategy fast", "plan show plan.json --costs",
    "plan make workload.json -o out.json --strategy paper --model tiny",
    "plan show plan.json --model tiny --costs costs.yaml",
    "lab torture", "lab list", "lab run suite.yaml --share 0/2", "lab run suite.yaml --here --step x.json",
    "lab measure",
    "lab measure suite.yaml end_to_end plan.json", "lab measure suite.yaml --out d", "lab figure suite.yaml --out f",
    "lab figure suite.yaml lossless plan.json", "lab figure smoke lossless a.csv b.csv --out f",
    "lab check suite.yaml --out x", "lab profile-costs suite.yaml plan.json", "lab profile-costs suite.yaml -o x.yaml",
    "lab profile-costs suite.yaml plan.json -o x.yaml",
    "lab figure smoke planner_bubble plan.json --out f --checks d", "lab check suite.yaml systems --curves c.csv",
    "lab check suite.yaml lossless --system peft --out o.json",
    "lab validate", "lab validate suite.yaml", "lab validate suite.yaml plan.json",
    "lab validate suite.yaml plan.json plan.json",
    "lab validate suite.yaml plan.json plan.json --out f --costs plan.json",
    "lab contract",
    "lab publish suite.yaml plan.json", "lab publish suite.yaml --out d", "lab report", "lab report a b",
    "lab preflight", "lab preflight a b",
    "reproduce a b", "lab tree-hash a b",
)  # fmt: skip
OUTPUTS = {
    "proc": "/proc/out.json", "proc-self": "/proc/self/out.json", "sys": "/sys/out.json", "full": "/dev/full",
    "null": "/dev/null", "zero": "/dev/zero", "a-folder": "folder", "nothing": "", "here": ".", "above": "..",
    "root": "/",
    "a-link": "link.json", "a-link-to-nothing": "dangling.json", "a-circle": "circle.json",
    "under-a-file": "plan.json/x.json",
    "its-input": "plan.json", "too-long": "x" * 300 + ".json", "a-pipe": "pipe", "read-only": "locked/x.json",
    "under-a-circle": "circle.json/x.json", "a-long-path": "d/" * 3000 + "x.json",
}  # fmt: skip
# The commands that write, with the place of what they write.
WRITERS = {
    "workload": "workload xsum --samples 4 --out {}",
    "plan make": "plan make workload.json --out {}",
    "plan show": "plan show plan.json --out {}",
    "plan show trace": "plan show plan.json --trace {}",
    "plan propose": "plan propose workload.json --model tiny --gpus 2 --out {}",
    "plan propose trace": "plan propose workload.json --model tiny --gpus 2 --trace {}",
    "lab check": "lab check suite.yaml learning --out {}",
    "lab check curves": "lab check suite.yaml lossless --out o.json --curves {}",
    "lab measure": "lab measure smoke end_to_end r.json --any-suite --incomplete --out {}",
    "lab figure": "lab figure smoke lossless c.csv --out {}",
    "lab publish": "lab publish smoke t.parquet --out {}",
    "lab run": "lab run suite.yaml --step {}",
}
NAMES_WITHOUT_SUFFIX = ("a-folder", "a-link", "a-link-to-nothing", "a-circle", "a-pipe", "full", "null", "zero")
ANY_FOLDER = ("a-folder", "here", "above", "nothing", "too-long", "root")  # what may be fine where a folder is written
COMMANDS = ("lab tree-hash", "lab check", "lab contract", "lab figure", "lab list", "lab measure", "lab publish",
            "lab preflight", "lab report", "lab run", "plan make", "plan show", "plan propose", "patch", "reproduce",
            "train", "workload")  # fmt: skip


def all_cases() -> Iterator[Case]:
    for part in (_options, _lines, _outputs, _names, _environments, _large):
        yield from part()


def of_line(name: str, line: str, value: str | None = None, **options: Any) -> Case:
    """A case of a whole line; value: of the word `{}` in it."""
    words = [value if word == "{}" and value is not None else word for word in line.split()]
    command = next((command for command in COMMANDS if line.startswith(command)), "")
    if line.startswith("plan ") and not command:
        command = "plan"
    return Case(name, command, tuple(words[len(command.split()) :]), **options)


def label(value: str) -> str:
    return re.sub("[^A-Za-z0-9.-]+", "_", value[:24]).strip("_") or "sign"


def _options() -> Iterator[Case]:
    table = valid.sealed_files("t.csv", valid.csv())
    for name, (line, values) in OPTIONS.items():
        for index, value in enumerate(values):
            adapters = line.startswith("patch")
            yield of_line(f"options/{name.replace(' ', '-')}/{index}-{label(value)}", line, value,
                          files=FILES | table, light=not adapters, libraries=adapters)  # fmt: skip


def _lines() -> Iterator[Case]:
    for line in LINES:
        yield of_line(f"lines/{line.replace(' ', '_').replace('/', '-')}", line, files=FILES, light=True)


def _places(folder: Path) -> None:
    """What outputs lead to."""
    (folder / "folder").mkdir()
    (folder / "link.json").symlink_to("plan.json")
    (folder / "dangling.json").symlink_to("nowhere.json")
    (folder / "circle.json").symlink_to("circle.json")
    os.mkfifo(folder / "pipe")
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0o500)


def _outputs() -> Iterator[Case]:
    files = FILES | valid.sealed_files("t.csv", valid.csv()) | valid.sealed_files("c.csv", valid.CURVES)
    files |= {"r.json": valid.text(valid.result())} | valid.sealed_files("t.parquet", valid.end_to_end())
    for writer, line in WRITERS.items():
        whole_folder = writer in ("lab measure", "lab publish")
        for name, place in OUTPUTS.items():
            if name == "its-input" and writer not in ("plan show", "plan show trace"):
                continue
            if whole_folder and name in ANY_FOLDER:
                continue
            if writer == "lab figure" and name in NAMES_WITHOUT_SUFFIX:
                continue  # a figure's files have other names
            case = of_line(f"outputs/{writer.replace(' ', '-')}/{name}", line, place, files=files, before=_places,
                           light=True)  # fmt: skip
            yield case
        if writer not in ("lab check", "lab check curves", "lab run"):
            yield of_line(f"outputs/{writer.replace(' ', '-')}/full-disk", line,
                          "d" if whole_folder else "f.html" if writer == "plan show" else "f", files=files,
                          limits={"RLIMIT_FSIZE": 0}, cpu=4.0, owns=("d",))  # fmt: skip
    for name, place in OUTPUTS.items():
        if name in ("a-folder", "nothing", "too-long"):
            continue  # a folder is what it writes
        jobs = SYNTHETIC.replace(b"output: out", b"output: " + place.encode())
        yield of_line(f"outputs/train/{name}", "train jobs.yaml", files=FILES | {"jobs.yaml": jobs}, before=_places,
                      libraries=name in ("proc", "proc-self", "sys", "read-only"))  # fmt: skip
    yield of_line("outputs/train/full-disk", "train jobs.yaml", files={"jobs.yaml": SYNTHETIC}, libraries=True,
                  limits={"RLIMIT_FSIZE": 0}, cpu=4.0, may_write=True)  # fmt: skip
    for line in ("lab list suite.yaml", "plan show plan.json", "lab tree-hash", "--version", "train --schema",
                 "--help", "plan propose workload.json --model tiny --gpus 2"):  # fmt: skip
        words = label(line)
        yield of_line(f"stdout/full/{words}", line, files=FILES, stdout="/dev/full")
        yield of_line(f"stdout/closed/{words}", line, files=FILES, stdout="closed", statuses=EITHER)
        yield of_line(f"stdin/closed/{words}", line, files=FILES, stdin="closed", statuses=DONE)


def _names() -> Iterator[Case]:
    """Names of files that nobody gives a file, but somebody does. The file is there, and is not what it should be."""
    names = {
        "newline": "a\nb", "escape": "a\x1b[31mb", "bell": "a\x07b", "blank": " ", "dash": "-x", "dashes": "--out",
        "quote": "a'b\"c", "shell": "$(touch PWNED)", "backtick": "`touch PWNED`", "percent": "%s%n",
        "braces": "{0}{x}",
        "emoji": "\U0001f642", "right-to-left": "\u202egnp", "bytes": "a\udcff\udcfeb", "long": "n" * 240,
        "markup": "[red]x",
        "tilde": "~nobody", "dots": "...",
    }  # fmt: skip
    for name, stem in names.items():
        for kind, suffix, line in (("jobs", ".yaml", "train ./{}"), ("suite", ".yaml", "lab list ./{}"),
                                   ("plan", ".json", "plan show ./{}"),
                                   ("table", ".csv", "lab figure smoke planner_bubble ./{} --out f")):  # fmt: skip
            file = stem + suffix
            words = tuple(word.replace("{}", file) for word in line.split())
            command = next(command for command in COMMANDS if line.startswith(command))
            yield Case(f"names/{kind}/{name}", command, words[len(command.split()) :], {file: b"torture: 1\n"},
                       light=True)  # fmt: skip


def _environments() -> Iterator[Case]:
    """Environments in which a command works, or says why not."""
    files = FILES | {"jobs.yaml": SYNTHETIC, "hub.yaml": SYNTHETIC.replace(b"model: tiny", b"model: acme/tiny")}
    settings: dict[str, dict[str, str | None]] = {
        "no-home": {"HOME": None}, "home-nowhere": {"HOME": "/nowhere"}, "home-empty": {"HOME": ""},
        "no-path": {"PATH": ""},
        "tmp-nowhere": {"TMPDIR": "/nowhere"}, "lang-c": {"LANG": "C", "LC_ALL": "C"},
        "ascii": {"PYTHONIOENCODING": "ascii"},
        "latin-1": {"LANG": "xx_YY.ISO-8859-1", "PYTHONIOENCODING": "latin-1"}, "columns-word": {"COLUMNS": "word"},
        "columns-1": {"COLUMNS": "1"}, "columns-negative": {"COLUMNS": "-5"}, "no-terminal": {"TERM": "torture"},
        "log-level": {"LORAFUSION_LOG_LEVEL": "word"}, "log-level-empty": {"LORAFUSION_LOG_LEVEL": ""},
        "threads": {"OMP_NUM_THREADS": "word"}, "backend": {"MPLBACKEND": "torture"},
        "matplotlib": {"MPLCONFIGDIR": "/proc/x"}, "dev-mode": {"PYTHONDEVMODE": "1"}, "utf8-off": {"PYTHONUTF8": "0",
                                                                                                    "LANG": "C"},
        "optimised": {"PYTHONOPTIMIZE": "2"}, "ranks": {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"},
        "slurm": {"SLURM_JOB_ID": "word", "SLURM_NTASKS": "-1", "SLURM_PROCID": "word"},
        "hub-words": {"HF_HUB_OFFLINE": "word", "HF_HOME": "/proc/x"}, "wandb": {"WANDB_MODE": "torture",
                                                                                 "WANDB_DIR": "/proc"},
    }  # fmt: skip
    for name, environment in settings.items():
        for line in (
            "plan show plan.json --out f.svg",
            "lab list suite.yaml",
            "workload xsum --samples 4 --out w.json",
        ):
            yield of_line(f"environment/{name}/{label(line)}", line, files=files, environment=environment, fresh=True,
                          statuses=EITHER if name in ("log-level", "backend") else DONE, may_write=True)  # fmt: skip
    distributed = {
        "rank": {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        "rank-words": {"RANK": "word", "WORLD_SIZE": "word", "LOCAL_RANK": "word"},
        "elastic": {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "3"},
        "torchrun": {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "word", "PET_STANDALONE": "1"},
        "devices": {"CUDA_VISIBLE_DEVICES": "99", "LOCAL_WORLD_SIZE": "-1"},
        "slurm": {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1"},
        "no-home": {"HOME": None}, "lang-c": {"LANG": "C", "LC_ALL": "C"}, "tmp-nowhere": {"TMPDIR": "/nowhere"},
    }  # fmt: skip
    for name, environment in distributed.items():
        yield of_line(f"environment/train-{name}/done", "train jobs.yaml", files=files, environment=environment,
                      fresh=True, statuses=DONE, may_write=True, cpu=60.0, wall=150.0)  # fmt: skip
    named = {f"{name}.py": b"raise SystemExit(1)\n" for name in ("queue", "random", "torch", "yaml")}
    yield of_line("environment/files-of-the-folder/train", "train jobs.yaml", files=files | named, fresh=True,
                  statuses=DONE, may_write=True, cpu=60.0, wall=150.0)  # fmt: skip
    for name, environment in {"offline": {"HF_HUB_OFFLINE": "1"}, "online": {}}.items():
        yield of_line(f"environment/hub-{name}/train", "train hub.yaml", files=files, environment=environment,
                      fresh=True, cpu=9.0)  # fmt: skip
    for line in ("lab tree-hash", "plan show plan.json", "train jobs.yaml", "lab list smoke", "--version",
                 "workload xsum --samples 4 --out w.json", "reproduce torture", "patch x"):  # fmt: skip
        yield of_line(
            f"environment/folder-gone/{label(line)}", line, gone=True, statuses=EITHER, may_write=True, cpu=6.0
        )


def _large() -> Iterator[Case]:
    """Sizes that are real, and must work."""
    yield of_line("large/a-million-samples", "workload xsum --samples 1000000 --out w.json", statuses=DONE,
                  may_write=True, cpu=60.0, wall=120.0, memory=2**21)  # fmt: skip # for each of 4 adapters
    jobs = SYNTHETIC.replace(b"samples: 8", b"samples: 1000000").replace(b"model: tiny", b"model: nowhere/../x")
    yield of_line("large/a-million-samples-in-jobs", "train jobs.yaml", files={"jobs.yaml": jobs}, light=True)
    aliases = b"x: &a " + b"a" * 1000 + b"\n" + b"".join(b"k%d: *a\n" % number for number in range(2000))
    yield of_line(
        "large/aliases-of-long-words", "train jobs.yaml", files={"jobs.yaml": valid.JOBS + aliases}, light=True
    )
    yield of_line("large/a-row-of-3-megabytes", "train jobs.yaml", libraries=True, may_write=True, statuses=EITHER,
                  files=valid.jobs_folder(rows=b'{"q": "x", "a": "' + b"word " * 600_000 + b'"}\n') |
                  {"out": b"a file, so that nothing is trained"})  # fmt: skip
    many = b"".join(b"  - {name: j%d, data: {synthetic: {samples: 0}}}\n" % number for number in range(3000))
    yield of_line("large/many-jobs", "train jobs.yaml", light=True, files={"jobs.yaml": SYNTHETIC + many})
