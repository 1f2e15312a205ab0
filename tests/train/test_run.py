"""`lorafusion train` from end to end: files that others can read, jobs that come and go, every way to be stopped."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorafusion.core.config import read_model, read_system
from lorafusion.core.plan import Plan
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.launch.lock import locked
from lorafusion.launch.outcome import Outcome
from lorafusion.planning import plan_workload
from lorafusion.train import run as training
from lorafusion.train.run import DONE, FAILED, STOPPED, train
from tests import forked
from tests.tiny_tokenizer import save_tokenizer
from tests.train import playback

JOBS = {
    "alice": {"rank": 4, "seed": 1},
    "bob": {"rank": 8, "seed": 2, "dropout": 0.1},
    "carol": {"seed": 3, "schedule": "cosine", "warmup_steps": 3, "rank": 6},
    "wild": {"seed": 5, "learning_rate": 100, "weight_decay": 100, "alpha": 1.0e6, "max_grad_norm": None},
}
SETTINGS = {
    "model": "tiny", "output": "out", "capacity": 256, "save_every": 4, "dtype": "float64", "adapter_dtype": "float64",
    "defaults": {"data": {"synthetic": {"samples": 24, "dataset": "xsum", "scale": 32}}, "learning_rate": 1e-2,
                 "evaluation": 0.1, "evaluate_every": 2, "global_batch_size": 4, "epochs": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _runs_are_forked(monkeypatch):
    monkeypatch.setattr(training, "launch", forked.launch)


def jobs_file(folder: Path, names: str, **changes) -> Path:
    """A jobs file for some of JOBS, with any key of the file changed."""
    folder.mkdir(exist_ok=True)
    path = folder / "jobs.yaml"
    jobs = [{"name": name} | JOBS[name] for name in names.split()]
    path.write_text(yaml.safe_dump(SETTINGS | {"jobs": jobs} | changes))
    return path


def interrupted(monkeypatch, number: int, slot: int, then=lambda: None) -> None:
    """Send this process a signal once, when all processes are before a slot."""
    looks = []  # one for all runs of a training, which goes on after SIGHUP

    def do() -> None:
        then()
        os.kill(os.getpid(), number)

    def launch(spec, processes, look, **options):
        def look_too() -> None:
            look()
            looks[0]()

        if not looks:
            looks.append(forked.once_before(slot, Path(spec.saving.folder), processes, do))
        return forked.launch(spec, processes, look=look_too, **options)

    monkeypatch.setattr(training, "launch", launch)


def adapters(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "adapters" / name / "adapter_model.safetensors")


def rows(folder: Path, name: str) -> list[dict]:
    """The job's steps."""
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row.pop("job") == name]


def assert_trained_alike(folder: Path, other: Path, names: str) -> None:
    """In float64 the rounding of another packing is all that may tell them apart."""
    for name in names.split():
        ours, theirs = adapters(folder, name), adapters(other, name)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] - value).norm() <= 1e-10 * value.norm() for key, value in theirs.items())
        for mine, yours in zip(rows(folder, name), rows(other, name), strict=True):
            assert mine == pytest.approx(yours, rel=1e-10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All jobs that end well, trained in one go."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "launch", forked.launch)
        assert train(jobs_file(folder, "alice bob carol")) == DONE
    return folder


def test_what_is_written_is_for_those_to_read_whom_the_umask_lets(whole):
    os.umask(mask := os.umask(0))
    written = [path for path in (whole / "out").rglob("*") if path.is_file()]
    assert len(written) > 20
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~mask}


def test_what_comes_out(whole):
    out = whole / "out"
    status = json.loads((out / "status.json").read_text())
    assert (status["status"], status["note"]) == ("ok", "")
    assert status["jobs"] == {name: {"state": "exported", "steps": 12} for name in ("alice", "bob", "carol")}
    for name in ("alice", "bob", "carol"):
        steps = rows(whole, name)
        assert [row["step"] for row in steps] == list(range(1, 13))  # 22 samples, 4 at a time, twice
        assert steps[-1]["loss"] < steps[0]["loss"] / 2
        assert [row["step"] for row in steps if "evaluation" in row] == [2, 4, 6, 8, 10, 12]
        folder = out / "adapters" / name
        card = (folder / "README.md").read_text()
        assert f"{steps[-1]['loss']:.4f} at the last" in card
        assert f"{steps[-1]['evaluation']:.4f} (2 samples)" in card
        assert len(json.loads((folder / "training.json").read_text())["steps"]) == 12
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_training_is_not_done_again(whole, monkeypatch, capsys):
    monkeypatch.setattr(training, "launch", None)
    assert train(whole / "jobs.yaml") == DONE
    assert "all jobs are trained" in capsys.readouterr().err


def test_stopped_and_started_it_is_as_if_nothing_had_been(whole, tmp_path, monkeypatch, capsys):
    path = jobs_file(tmp_path, "alice bob carol")
    interrupted(monkeypatch, signal.SIGTERM, 4)
    assert train(path) == STOPPED
    assert (
        f"stopped by SIGTERM, after saving a checkpoint; `lorafusion train {path}` goes on" in capsys.readouterr().err
    )
    monkeypatch.setattr(training, "launch", forked.launch)
    assert train(path) == DONE
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    for name in ("alice", "bob", "carol"):
        assert all(torch.equal(value, adapters(whole, name)[key]) for key, value in adapters(tmp_path, name).items())
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == (whole / "out" / "metrics.jsonl").read_text()


def test_jobs_come_and_go_without_a_trace_in_the_others(whole, tmp_path, monkeypatch):
    """Bob leaves and Carol comes while Alice trains, on SIGHUP, and the pipeline gets a second stage and replica. Then
    Bob comes back to where he was."""
    path = jobs_file(tmp_path, "alice bob")
    changed = {"processes": 4, "data_parallel": 2}
    interrupted(monkeypatch, signal.SIGHUP, 4, then=lambda: jobs_file(tmp_path, "alice carol", **changed))
    assert train(path) == DONE
    assert_trained_alike(tmp_path, whole, "alice carol")
    assert not (tmp_path / "out" / "adapters" / "bob").exists()
    assert train(jobs_file(tmp_path, "alice bob carol")) == DONE
    assert_trained_alike(tmp_path, whole, "alice bob carol")
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 3


def test_a_job_of_a_higher_priority_comes_in_ahead_of_the_others(whole, tmp_path, monkeypatch, capsys):
    """On SIGHUP, in the middle of Alice's and Bob's training; what is under way may change its weight."""
    changed = [{"name": "alice"} | JOBS["alice"] | {"weight": 0.5}, {"name": "bob"} | JOBS["bob"],
               {"name": "carol"} | JOBS["carol"] | {"priority": 1}]  # fmt: skip
    path = jobs_file(tmp_path, "alice bob", capacity=80)
    interrupted(monkeypatch, signal.SIGHUP, 4, then=lambda: jobs_file(tmp_path, "", jobs=changed, capacity=80))
    assert train(path) == DONE
    assert_trained_alike(tmp_path, whole, "alice bob carol")
    plan = Plan.read(tmp_path / "out" / "runs" / "001" / "plan.json")
    last = {adapter: slot for slot, one in enumerate(plan.microbatches) for adapter in one.step_after}
    assert last[2] < min(last[0], last[1])
    capsys.readouterr()
    assert train(path) == DONE  # a priority and a weight that were there before are none on a job that is done
    assert "all jobs are trained" in capsys.readouterr().err
    changed[1]["priority"] = 2
    with pytest.raises(UserError, match="job 'bob': priority is 2, but the job is done, with 12 steps in .*; leave it"):
        train(jobs_file(tmp_path, "", jobs=changed))
    del changed[1]["priority"], changed[2]["priority"]
    assert train(jobs_file(tmp_path, "", jobs=changed)) == DONE


@pytest.mark.parametrize("processes", [1, 2])
def test_an_adapter_that_is_no_number_harms_none(whole, tmp_path, capsys, processes):
    assert train(jobs_file(tmp_path, "alice wild bob", processes=processes)) == FAILED
    note = "wild at step 3: the gradient is not finite, the adapter has the weights before; the others are trained"
    assert f"error: nan: {note}" in capsys.readouterr().err
    assert_trained_alike(tmp_path, whole, "alice bob")
    assert all(value.isfinite().all() for value in adapters(tmp_path, "wild").values())
    assert "**Stopped at step 3" in (tmp_path / "out" / "adapters" / "wild" / "README.md").read_text()


def test_a_process_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    """A token store that was damaged since the run was planned."""
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text("".join(json.dumps({"text": f"{i} words"}) + "\n" for i in range(8)))
    save_tokenizer(tmp_path / "tokenizer")
    job = {"name": "a", "data": {"jsonl": "rows.jsonl", "completion": "{text}"}, "evaluation": 0.2}
    path = jobs_file(tmp_path, "alice", jobs=[job], tokenizer="tokenizer")
    launch = training.launch

    def damaged(spec, *arguments, **options):
        (Path(spec.tokens) / "a.safetensors").write_bytes(b"nothing")
        return launch(spec, *arguments, **options)

    monkeypatch.setattr(training, "launch", damaged)
    assert train(path) == FAILED
    *_, before, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: crash: rank 0 (stage 0 of 1), ")
    assert "a.safetensors: not a whole safetensors file" in error
    assert before.endswith(f"log.txt has what came before; `lorafusion train {path}` goes on")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "begun with dtype 'float64', now it is 'float32'; take another output folder"),
        ({"seed": 2}, "begun with seed 1, now it is 2"),
        ({"jobs": [{"name": "alice", "rank": 5, "seed": 1}]}, "job 'alice': rank is 5, but its 12 steps in"),
        ({"jobs": [{"name": "alice", "rank": 4, "seed": 1, "epochs": 3}]}, "job 'alice': epochs is 3, but its"),
        (
            {"jobs": [{"name": "alice", "rank": 4, "seed": 1, "weight": 2}]},
            "job 'alice': weight is 2.0, but the job is",
        ),
    ],
)
def test_what_was_trained_otherwise_is_not_gone_on_with(whole, changes, message):
    path = whole / "other.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"jobs": [{"name": "alice"} | JOBS["alice"]]} | changes))
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        train(path)


def test_two_trainings_do_not_share_a_folder(whole):
    with (
        locked(whole / "out"),
        pytest.raises(UserError, match="another training is using this folder"),
    ):
        train(whole / "jobs.yaml")


def test_peft_computes_the_same_loss_with_the_adapter(tmp_path):
    """A Hugging Face folder and text in, an adapter out, which PEFT puts on the same model: its loss on the held-out
    rows, template and all, is the one that was reported."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    model, rows_file = tmp_path / "model", tmp_path / "rows.jsonl"
    save_tokenizer(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=256)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    held_out = {"question": "nine and one", "answer": "ten"}
    sums = [{"question": f"{i} and 1", "answer": str(i + 1)} for i in range(12)]
    rows_file.write_text("".join(json.dumps(one) + "\n" for one in sums))
    (tmp_path / "held_out.jsonl").write_text(json.dumps(held_out) + "\n")
    templates = {"prompt": "Q: {question} A: ", "completion": "{answer}"}
    job = {"name": "sums", "data": {"jsonl": "rows.jsonl"} | templates, "rank": 4, "learning_rate": 1e-2, "epochs": 3,
           "evaluation": {"jsonl": "held_out.jsonl"} | templates}  # fmt: skip
    settings = {"model": "model", "output": "out", "dtype": "float32", "processes": 2, "jobs": [job]}
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(settings))
    assert train(tmp_path / "jobs.yaml") == DONE
    reported = rows(tmp_path, "sums")[-1]["evaluation"]

    base = AutoModelForCausalLM.from_pretrained(model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "sums").eval()
    prompt = tokenizer(f"Q: {held_out['question']} A: ").input_ids
    answer = tokenizer(held_out["answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        expected = loaded(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item()
    assert reported == pytest.approx(expected, rel=1e-5)
    with torch.no_grad(), loaded.disable_adapter():
        without = loaded(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item()
    assert abs(without - expected) > 0.1


def test_graphs_on_a_cpu_are_refused_before_anything_is_written(tmp_path, capsys):
    path = playback.jobs_file(tmp_path, graphs="on")
    with pytest.raises(UserError) as refused:
        train(path)
    assert str(refused.value) == (
        f"{path}: graphs: found on, expected auto or off: the device is cpu, and graphs need a GPU"
    )
    assert not (tmp_path / "out").exists()


def test_cudnn_on_a_cpu_is_refused_before_anything_is_written(tmp_path):
    path = playback.jobs_file(tmp_path, attention="cudnn")
    with pytest.raises(
        UserError, match=r"jobs.yaml: attention: found cudnn, expected auto or flash: the device is cpu"
    ):
        train(path)
    assert not (tmp_path / "out").exists()


def test_graphs_of_a_model_that_asks_its_device_are_refused_before_anything_is_written(tmp_path):
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    model = tmp_path / "model.yaml"
    model.write_text(read_model("tiny").model_copy(update=rope).model_dump_json())
    path = playback.jobs_file(tmp_path, graphs="on", device="cuda", model=str(model))
    with pytest.raises(UserError, match=r"jobs.yaml: graphs: found on, expected auto or off: the host asks the device"):
        train(path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("planner", ["fast", "sequential"])
def test_the_planner_is_the_one_that_the_systems_file_names(tmp_path, monkeypatch, planner):
    entry = read_system("lorafusion").model_copy(update={"planner": f"lorafusion.planning.{planner}:plan"})
    monkeypatch.setattr("lorafusion.planning.read_system", lambda name: entry)
    monkeypatch.setattr(training, "launch", lambda *_, **__: Outcome("crash", "nothing is run here"))
    train(playback.jobs_file(tmp_path))
    run = tmp_path / "out" / "runs" / "000"
    workload = Workload.read(run / "workload.json")
    planned = {name: plan_workload(workload, name, stages=1, capacity=64) for name in ("fast", "sequential")}
    assert planned["fast"].microbatches != planned["sequential"].microbatches
    assert Plan.read(run / "plan.json").microbatches == planned[planner].microbatches
