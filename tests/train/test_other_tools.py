"""Keys of other tools in a jobs file: what means the same is taken, what does not is told in one line."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from jsonschema import Draft202012Validator

from lorafusion.core.config import CONFIGS, read_model
from lorafusion.core.schema import UserError
from lorafusion.core.workload import ALL_LINEAR
from lorafusion.train.config import JOB_KEYS, TrainConfig, read_train_config
from lorafusion.train.other_tools import CLOSED, HINTS, KEYS, OURS, VALUES, WAYS
from lorafusion.train.prepare import prepare
from lorafusion.train.schema import jobs_schema

SCHEMA = Draft202012Validator(json.loads(jobs_schema()))
TINY = read_model("tiny")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.yaml"


@pytest.fixture
def read(path):
    """Reads a jobs file whose job `a` has these keys; `top` are the file's."""

    def read(top=None, defaults=None, **job) -> TrainConfig:
        top = {"model": "tiny", "output": "out"} | (top or {})
        data = {"name": "a", "data": {"synthetic": {"samples": 20, "scale": 64}}}
        jobs = {"defaults": defaults, "jobs": [data | job]}
        path.write_text(yaml.safe_dump({key: value for key, value in (top | jobs).items() if value is not None}))
        return read_train_config(path)

    return read


def test_a_key_is_ours_or_theirs():
    ours = {*TrainConfig.model_fields} | JOB_KEYS
    assert {*KEYS} <= ours
    assert not {*OURS} & ours
    assert not {*HINTS} & (ours | {*OURS})
    assert {*VALUES} <= ours | {*OURS} | {*HINTS}
    assert {*CLOSED} <= {*VALUES}
    assert {key for ways in WAYS for way in ways for key in way} <= JOB_KEYS


JOB = {  # what other tools' files have, and what it means
    "r: 8": {"rank": 8},
    "lora_r: 8": {"rank": 8},
    "lora_rank: 8": {"rank": 8},
    "lora_alpha: 16": {"alpha": 16.0},
    "lora_dropout: 0.1": {"dropout": 0.1},
    "use_rslora: true": {"rslora": True},
    "lr: 1e-4": {"learning_rate": 1e-4},
    "learning_rate: 5.0e-05": {"learning_rate": 5e-5},
    "weight_decay: 1e-2": {"weight_decay": 0.01},
    "max_grad_norm: 3e-1": {"max_grad_norm": 0.3},
    "clip_grad_norm: 1": {"max_grad_norm": 1.0},
    "num_train_epochs: 3.0": {"epochs": 3},
    "num_epochs: 2": {"epochs": 2},
    "max_steps: 60": {"steps": 60},
    "max_steps: 1e2": {"steps": 100},
    "max_steps: -1": {"steps": None},
    "max_seq_length: 2048": {"max_length": 2048},
    "max_seq_len: 2048": {"max_length": 2048},
    "cutoff_len: 1024": {"max_length": 1024},
    "sequence_len: 4096": {"max_length": 4096},
    "max_length: 512": {"max_length": 512},
    "warmup_steps: 5": {"warmup_steps": 5},
    "warmup_ratio: 3e-2": {"warmup_ratio": 0.03},
    "lr_scheduler_type: cosine": {"schedule": "cosine"},
    "lr_scheduler_type: constant_with_warmup": {"schedule": "constant"},
    "lr_scheduler: linear": {"schedule": "linear"},
    "per_device_train_batch_size: 2": {"global_batch_size": 2},
    "micro_batch_size: 2": {"global_batch_size": 2},
    "{per_device_train_batch_size: 2, gradient_accumulation_steps: 4}": {"global_batch_size": 8},
    "{batch_size: 2, gradient_accumulation_steps: 1e1}": {"global_batch_size": 20},
    "val_set_size: 5e-2": {"evaluation": 0.05},
    "val_size: 0.1": {"evaluation": 0.1},
    "{val_size: 0.1, eval_steps: 20}": {"evaluate_every": 20},
    "train_on_inputs: true": {"learn_prompt": True},
    "train_on_prompt: false": {"learn_prompt": False},
    "target_modules: all-linear": {"target_modules": ALL_LINEAR},
    "target_modules: [all-linear]": {"target_modules": ALL_LINEAR},
    "lora_target: all": {"target_modules": ALL_LINEAR},
    "lora_target_linear: true": {"target_modules": ALL_LINEAR},
    "lora_target_linear: false": {"target_modules": ALL_LINEAR},
    "target_modules: q_proj": {"target_modules": ("q_proj",)},
    "lora_target: 'q_proj, v_proj'": {"target_modules": ("q_proj", "v_proj")},
    "lora_target_modules: [q_proj, v_proj]": {"target_modules": ("q_proj", "v_proj")},
}
FILE = {  # with an editor saying of two that they are needless or spelt otherwise
    "base_model: tiny": {"model": "tiny"},
    "model_name_or_path: tiny": {"model": "tiny"},
    "bf16: true": {"dtype": "bfloat16"},
    "bf16: auto": {"dtype": None},
    "{bf16: false, fp16: true}": {"dtype": "float16"},
    "torch_dtype: float32": {"dtype": "float32"},
    "torch_dtype: auto": {"dtype": None},
    "dtype: bf16": {"dtype": "bfloat16"},
    "gradient_checkpointing: true": {"checkpointing": "all"},
    "gradient_checkpointing: false": {"checkpointing": "none"},
    "enable_activation_checkpointing: true": {"checkpointing": "all"},
    "save_total_limit: 3": {"keep": 3},
    "num_processes: 2": {"processes": 2},
    "report_to: wandb": {"wandb": "online"},
    "report_to: none": {"wandb": "off"},
    "load_in_4bit: false": {},
}


@pytest.mark.parametrize("written", JOB)
@pytest.mark.parametrize("place", ["job", "defaults"])
def test_a_key_of_a_job_is_taken(read, written, place):
    keys = yaml.safe_load(written)
    (job,) = (read(**keys) if place == "job" else read(defaults=keys)).jobs
    assert {name: getattr(job, name) for name in JOB[written]} == JOB[written]
    assert not {*json.loads(job.model_dump_json())} & {*OURS, *VALUES} - {"schedule"}
    data = {"synthetic": {}}
    assert not list(SCHEMA.iter_errors({"model": "tiny", "jobs": [{"name": "a", "data": data} | meant(keys)]}))


@pytest.mark.parametrize("written", FILE)
def test_a_key_of_the_file_is_taken(read, path, written):
    keys = yaml.safe_load(written)
    config = read({"model": None} | keys if "tiny" in written else keys)
    assert {name: getattr(config, name) for name in FILE[written]} == FILE[written]
    assert list(SCHEMA.iter_errors(yaml.safe_load(path.read_text()))) == [] or written in (
        "dtype: bf16",
        "load_in_4bit: false",
    )


def meant(keys):
    """Numbers as YAML 1.2, which editors read, has them."""
    return {key: float(value) if re.fullmatch(r"\de-?\d", str(value)) else value for key, value in keys.items()}


def test_an_output_of_another_tool_is_taken(read, tmp_path):
    assert read({"output": None, "output_dir": "elsewhere"}).output == tmp_path / "elsewhere"


def test_a_global_batch_is_that_of_all_replicas(read):
    top = {"processes": 4, "data_parallel": 2}
    assert read(top, per_device_train_batch_size=3, gradient_accumulation_steps=5).jobs[0].global_batch_size == 30


@pytest.mark.parametrize(
    ("defaults", "job", "expected"),
    [
        ({"lora_alpha": 8}, {"alpha": 4}, {"alpha": 4}),
        ({"alpha": 8}, {"lora_alpha": 4}, {"alpha": 4}),
        ({"micro_batch_size": 2}, {"gradient_accumulation_steps": 3}, {"global_batch_size": 6}),
        ({"micro_batch_size": 2}, {"global_batch_size": 3}, {"global_batch_size": 3}),
        ({"global_batch_size": 3}, {"batch_size": 2}, {"global_batch_size": 2}),
        ({"warmup_steps": 3}, {"warmup_ratio": 0.1}, {"warmup_steps": 0, "warmup_ratio": 0.1}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 3}, {"warmup_steps": 3, "warmup_ratio": 0.0}),
    ],
)
def test_a_job_wins_over_the_defaults_however_both_are_spelt(read, defaults, job, expected):
    (made,) = read(defaults=defaults, **job).jobs
    assert {name: getattr(made, name) for name in expected} == expected


MISTAKES = {
    "{alpha: 1, lora_alpha: 2}": "jobs.a: lora_alpha: means the same as alpha; expected one of them",
    "{lora_r: 1, r: 2}": "jobs.a: r: means the same as lora_r; expected one of them",
    "{global_batch_size: 8, micro_batch_size: 2}": "jobs.a: micro_batch_size: states what global_batch_size states",
    "{warmup_steps: 8, warmup_ratio: 0.1}": "jobs.a: warmup_ratio: states what warmup_steps states; expected one of",
    "gradient_accumulation_steps: 4": "jobs.a: gradient_accumulation_steps: needs per_device_train_batch_size; or",
    "{batch_size: two}": "jobs.a: batch_size: expected a whole number from 1 on, found 'two'",
    "{batch_size: true}": "jobs.a: batch_size: expected a whole number from 1 on, found True",
    "{batch_size: 1000000000000}": "jobs.a: batch_size: input should be less than or equal to 1000000 (found 1000",
    "lora_alpha: 0": "jobs.a: lora_alpha: input should be greater than 0 (found 0",
    "lora_alpha: true": "jobs.a: lora_alpha: input should be a valid number (found 'true')",
    "lora_alpha: .nan": "jobs.a: lora_alpha: input should be a finite number (found nan)",
    "lora_r: 1e30": "jobs.a: lora_r: input should be less than or equal to 256",
    "max_steps: 0": "jobs.a: max_steps: input should be greater than or equal to 1 (found 0)",
    "max_steps: 1e30": "jobs.a: max_steps: input should be less than or equal to 1000000000",
    "num_train_epochs: 2.5": "jobs.a: num_train_epochs: input should be a valid integer",
    "lr_scheduler_type: polynomial": "jobs.a: lr_scheduler_type: input should be 'constant', 'linear' or 'cosine'",
    "val_set_size: 100": "jobs.a: val_set_size: expected a share from 0 to 0.5, or a data block (found 100)",
    "lora_target_linear: q": "jobs.a: lora_target_linear: expected one of true, false, found 'q'",
    "load_in_4bit: true": "jobs.a: load_in_4bit: the base model is not quantised; did you mean dtype? (found True)",
    "datasets: x": "jobs.a: datasets: did you mean data? (found 'x')",
    "optim: adamw_8bit": "jobs.a: optim: delete it, the optimizer is AdamW (found 'adamw_8bit')",
    "bf16: true": "jobs.a: bf16: expected at the top of the file, not here",
    "lora_alhpa: 3": "jobs.a: lora_alhpa: unknown key (found 3); did you mean lora_alpha?",
    "target_modules: q": "jobs.a: target_modules: unknown linear 'q'; known: q_proj",
    "target_modules: 'q_proj, q'": None,  # an expression, of which the model decides
    "target_modules: '(q'": "jobs.a: target_modules: not a regular expression (",
    "target_modules: 3": "jobs.a: target_modules: input should be a valid tuple (found 3)",
}
TOP = {
    "lora_alpha: 3": "jobs.yaml: lora_alpha: expected in a job or in defaults, not here (found 3)",
    "epochs: 3": "jobs.yaml: epochs: expected in a job or in defaults, not here (found 3)",
    "{base_model: tiny, model_name: tiny}": "jobs.yaml: model_name: means the same as",
    "{bf16: true, fp16: true}": "jobs.yaml: fp16: means the same as bf16; expected one of them",
    "bf16: x": "jobs.yaml: bf16: expected one of true, false, auto, found 'x'",
    "load_in_4bit: true": "jobs.yaml: load_in_4bit: the base model is not quantised; did you mean dtype?",
    "save_steps: 500": "jobs.yaml: save_steps: did you mean save_every, in slots of the plan? (found 500)",
    "report_to: tensorboard": "jobs.yaml: report_to: expected one of wandb, none, found 'tensorboard'",
    "output_dri: x": "jobs.yaml: output_dri: unknown key (found 'x'); did you mean output_dir?",
    "1: x": "jobs.yaml: 1: unknown key (found 'x'); known: ",
}


@pytest.mark.parametrize("written", [name for name, message in MISTAKES.items() if message])
def test_a_mistake_in_a_job_has_the_key_of_the_file(read, written):
    with pytest.raises(UserError) as caught:
        read(**yaml.safe_load(written))
    (line,) = str(caught.value).splitlines()
    assert MISTAKES[written] in line
    assert len(line) <= 300


@pytest.mark.parametrize("written", TOP)
def test_a_mistake_at_the_top_has_the_key_of_the_file(read, written):
    with pytest.raises(UserError) as caught:
        read(yaml.safe_load(written))
    assert TOP[written] in str(caught.value)
    assert all(len(line) <= 300 for line in str(caught.value).splitlines())


def test_all_mistakes_of_a_file_are_told_at_once(path):
    path.write_text(
        "model: ./none\noutput: [x]\nbf16: maybe\nprocessors: 2\ndefaults: {colour: red}\njobs:\n"
        "  - {name: a, lora_r: 0, data: {jsonl: none.jsonl, completion: '{x}'}, evaluation: {text: none.txt}}\n"
        "  - {name: a, data: {synthetic: {samples: 0}}, schedule: step}\n"
        "  - {rank: 4}\n"
        "  - 7\n"
    )
    with pytest.raises(UserError) as caught:
        read_train_config(path)
    keys = [line.removeprefix(f"{path}: ").partition(": ")[0::2] for line in str(caught.value).splitlines()]
    assert sorted((place, rest.split(":")[0]) for place, rest in keys) == sorted(
        [
            ("bf16", "expected one of true, false, auto, found 'maybe'"),
            ("processors", "unknown key (found 2); did you mean processes?"),
            ("defaults", "colour"),
            ("jobs.a.data.jsonl", f"no such file {path.parent}/none.jsonl"),
            ("jobs.a.evaluation.text", f"no such file {path.parent}/none.txt"),
            ("jobs.a", "lora_r"),
            ("jobs.a.data", "synthetic.samples"),
            ("jobs.a", "schedule"),
            ("jobs.2", "name"),
            ("jobs.2", "data"),
            ("jobs.3", "expected a mapping, found 7"),
            ("jobs", "two are named 'a'; adapters need distinct names"),
            ("model", keys[[place for place, _ in keys].index("model")][1].split(":")[0]),
            ("output", "input is not a valid path for <class 'pathlib.Path'> (found a list)"),
        ]
    )


@pytest.mark.parametrize(
    ("pattern", "linears"),
    [
        (r".*(q|v)_proj", ("q_proj", "v_proj")),
        (r".*\.mlp\..*", ("gate_proj", "up_proj", "down_proj")),
        (r"model\.layers\.\d+\.self_attn\.o_proj", ("o_proj",)),
        (r"model\.layers\.[0-3]\.self_attn\.o_proj", ("o_proj",)),  # all four of them
        (r".*", ALL_LINEAR),
    ],
)
def test_an_expression_means_the_linears_that_it_matches(read, tmp_path, pattern, linears):
    config = read(target_modules=pattern)
    assert prepare(config, TINY, tmp_path / "run").jobs[0].target_modules == linears


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(q|v)_proj", "target_modules: '(q|v)_proj' matches no linear; the model has q_proj, k_proj, v_proj, o_proj"),
        ("q_proj, q", "target_modules: 'q_proj, q' matches no linear; the model has q_proj"),
        (r".*\.[01]\..*_proj", r"matches q_proj of 2 layers; expected all 4 or none"),
        (r"(?:(?:.|\w)+)+[^\w.]", "matches nothing within 0.5 s; expected a simpler regular expression"),
    ],
)
def test_an_expression_that_fits_no_linears_is_refused(read, tmp_path, pattern, message):
    config = read(target_modules=pattern)
    with pytest.raises(UserError) as caught:
        prepare(config, TINY, tmp_path / "run")
    assert f"{config.path}: jobs.a: " in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(0.03, 100, 3), (0.03, 101, 4), (0.5, 3, 2), (0.0, 3, 0)])
def test_a_warm_up_by_share_has_transformers_steps(read, tmp_path, ratio, steps, expected):
    config = read(warmup_ratio=ratio, steps=steps)
    assert prepare(config, TINY, tmp_path / "run").jobs[0].warmup_steps == expected


def test_a_warm_up_of_all_steps_is_refused(read, tmp_path):
    config = read(warmup_ratio=0.9, steps=2)
    with pytest.raises(UserError, match=r"jobs\.a: warmup_ratio: 0\.9 means 2, but the job has 2 step"):
        prepare(config, TINY, tmp_path / "run")


def test_the_page_has_all_keys():
    page = (CONFIGS.parent / "docs" / "reference" / "jobs-file.md").read_text()
    section = page.partition("## Keys of other tools\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`.*?) \| (.*?) \|", section, re.MULTILINE)
    written = {ours.strip("`"): {*re.findall(r"`(\w+)`", theirs)} for ours, theirs in rows}
    assert written == {ours: {*theirs} for ours, theirs in KEYS.items()}
