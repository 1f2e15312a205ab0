"""A mistake in a jobs file is told before torch is imported, within half a second of CPU, and nothing is written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import yaml

JOB = {"name": "a", "data": {"synthetic": {"samples": 4}}}
FILE = {"model": "tiny", "output": "out", "jobs": [JOB]}
ROWS = {"jsonl": "rows.jsonl", "completion": "{x}"}
MISTAKES = {
    "a key": (FILE | {"modle": "tiny"}, "modle: unknown key"),
    "a key of a job": (FILE | {"jobs": [JOB | {"rnk": 8}]}, "jobs.a: rnk: unknown key (found 8); did you mean rank?"),
    "a value": (FILE | {"jobs": [JOB | {"rank": 0}]}, "rank: input should be greater than or equal to 1 (found 0)"),
    "no file": (FILE | {"jobs": [JOB | {"data": {"text": "none.txt"}}]}, "jobs.a.data.text: no such file"),
    "a template": (FILE | {"jobs": [JOB | {"data": ROWS | {"prompt": "{"}}]}, "jobs.a.data: prompt: single '{'"),
    "a column": (FILE | {"jobs": [JOB | {"data": ROWS | {"prompt": "{y}"}}]}, "rows.jsonl:1: no field 'y'; found x"),
    "no model": (FILE | {"model": "./none"}, "model: expected a folder or a repository"),
    "a folder of a user's": (FILE | {"output": "."}, "holds files, but not those of a training"),
    "a name": (FILE | {"jobs": [JOB | {"name": "training"}]}, "name: torch's modules have an attribute of this name"),
    "processes": (FILE | {"processes": 4000, "data_parallel": 1000}, "processes: 4000 on this machine, expected"),
    "stages": (FILE | {"processes": 5}, "processes: 5 stages, but the model has 4 layers"),
    "a length": (FILE | {"jobs": [JOB | {"cutoff_len": 5000}]}, "max_length: 5000 tokens, but the model has 4096"),
    "an expression": (FILE | {"jobs": [JOB | {"lora_target": "(q|v)"}]}, "target_modules: '(q|v)' matches no linear"),
    "a warm-up": (FILE | {"jobs": [JOB | {"warmup_steps": 100}]}, "warmup_steps: 100, but the job has 1 step(s)"),
    "a warm-up of rows": (FILE | {"jobs": [JOB | {"data": ROWS, "warmup_steps": 2}]}, "warmup_steps: 2, but the job"),
    "a chat": (
        FILE | {"jobs": [JOB | {"data": {"jsonl": "chat.jsonl", "completion": "{x}"}}]},
        "chat.jsonl:1: field 'x' is a list of chat messages",
    ),
    "no file at all": (None, "jobs.yaml: no such YAML file"),
}
SAY = """
import json, resource, sys
from lorafusion.cli.main import main
try:
    main()
finally:
    heavy = [name for name in ("torch", "transformers", "pandas") if name in sys.modules]
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([heavy, used.ru_utime + used.ru_stime]))
"""


def seconds(code: str) -> float:
    """CPU of a process that runs some code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def start() -> float:
    """What every command of this kind costs."""
    return min(seconds("import typer, pydantic") for _ in range(2))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_torch_is_imported(tmp_path, start, name):
    content, message = MISTAKES[name]
    (tmp_path / "rows.jsonl").write_text('{"x": "y"}\n')
    (tmp_path / "chat.jsonl").write_text('{"x": [{"role": "user", "content": "y"}]}\n')
    if content is not None:
        (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(content))
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", SAY, "train", "jobs.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    heavy, used = json.loads(done.stdout)
    assert done.returncode == 2
    assert message in done.stderr
    assert all(line.startswith("error: ") and len(line) <= 300 for line in done.stderr.splitlines())
    assert heavy == []
    assert used - start <= 0.5
    assert sorted(tmp_path.rglob("*")) == before
