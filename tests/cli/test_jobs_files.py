"""What `lorafusion plan` takes from a jobs file."""

from __future__ import annotations

import json

from tests.cli.test_cli import lorafusion


def test_a_plan_of_a_jobs_file_has_its_sizes_and_writes_nothing_else(tmp_path):
    (tmp_path / "jobs.yaml").write_text(
        "model: tiny\noutput: out\nprocesses: 2\ncapacity: 512\njobs:\n"
        "  - {name: a, data: {synthetic: {samples: 8, scale: 16}}}\n"
    )
    done = lorafusion("plan", tmp_path / "jobs.yaml", "-o", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "p.json").read_text())
    assert (plan["stages"], plan["capacity"], "buckets" in plan) == (2, 512, True)
    (tmp_path / "jobs.yaml").write_text("graphs: auto\n" + (tmp_path / "jobs.yaml").read_text())
    assert lorafusion("plan", tmp_path / "jobs.yaml", "-o", tmp_path / "p.json").returncode == 0
    assert json.loads((tmp_path / "p.json").read_text())["buckets"]
    assert {path.name for path in tmp_path.iterdir()} == {"jobs.yaml", "p.json"}


def test_a_jobs_file_says_what_its_costs_depend_on(tmp_path):
    """The device, and whether layers are recomputed and stages replay graphs; a proposal is of GPUs, but without graphs
    where the device is to be a CPU."""
    path, plan_path, out = (tmp_path / name for name in ("jobs.yaml", "p.json", "o.json"))
    keys, choices = [], []
    for stated in ("", "checkpointing: none\n", "checkpointing: all\n", "device: cpu\n", "graphs: off\n"):
        path.write_text(
            f"model: tiny\noutput: out\ncapacity: 512\n{stated}jobs:\n"
            "  - {name: a, data: {synthetic: {samples: 8, scale: 16}}}\n"
        )
        assert lorafusion("plan", path, "-o", plan_path).returncode == 0
        assert lorafusion("plan", "propose", path, "--gpus", 1, "-o", out).returncode == 0
        keys.append(json.loads(plan_path.read_text())["key"])
        choices.append(json.loads(out.read_text())["choices"])
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
    assert choices[0] == choices[1] != choices[2]
    assert choices[3] == choices[4]
    assert choices[0][0]["throughput"] > 2 * choices[4][0]["throughput"]  # no host
