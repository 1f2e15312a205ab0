"""The released mLoRA itself (TUDB-Labs/mLoRA at 4abf120), in an environment of its own, on one of our workloads.

    python -m baselines.mlora.external WORKLOAD.json --model DIR --out RESULT.json

mLoRA needs Python 3.12, torch 2.2.1 with CUDA and transformers 4.38.2, so it cannot live in this project's environment:
LORAFUSION_MLORA_HOME names its checkout, LORAFUSION_MLORA_PYTHON its interpreter. DIR is a Hugging Face model that
transformers 4.38.2 can read, with its tokenizer. One GPU, the default dispatcher; a mini-batch is a whole global batch,
as mLoRA's accumulation of gradients is broken. The sample lengths are the workload's, the words are not: a filler word
repeated, which changes the losses and not the work. Config, data and log are kept in RESULT.mlora/.

**Never run against the real mLoRA**, for want of its environment: its options, files and log lines were read in its
source; tested is this side of them, with a stand-in that checks what it is given. The notes in the result say why its
numbers are not those of another system of the workflow.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import yaml
from transformers import AutoTokenizer

from lorafusion.core.files import require_outputs, write
from lorafusion.core.schema import UserError
from lorafusion.core.workload import ALL_LINEAR, MERGED, Job, Workload

COMMIT = "4abf120"
LONGEST = 4096  # its table of rotations
LEAST_DROPOUT = 1e-6  # it refuses 0
AROUND = 2  # <bos> and <eos>, which it puts around a text
STAMP = r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\] m-LoRA: "
LOSS = re.compile(STAMP + r"Adapter (\S+) loss: ([-+.\deE]+|nan|-?inf)")
STEP = re.compile(STAMP + r"Adapter (\S+) epoch: \d+/\d+ iteration: \d+/\d+ step: \d+")
NOTES = (
    "one iteration takes a global batch of every adapter, padded to the longest row of all, rounded up to 8",
    "seconds: from the losses of the first iteration to those of the last; throughputs: without the first's tokens",
    "mLoRA's loss is the mean over all positions, padding included, of a filler text",
    "LoRA in float32, initial weights Kaiming-normal; attention unfused, a float32 mask [rows, heads, length, length]",
    "its backward pass forgets the dropout mask; torch's AdamW with its default weight decay of 0.01",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m baselines.mlora.external", description="Run the released mLoRA.")
    parser.add_argument("workload", type=Path, help="a workload file")
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face model and its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="result to write")
    options = parser.parse_args(arguments)
    try:
        require_outputs([options.out], [options.workload])
        home, python = installation()
        workload = Workload.read(options.workload)
        folder = options.out.with_suffix(".mlora").resolve()
        notes = prepare(workload, options.model, folder)
        command = [
            str(python), "mlora_train.py", "--base_model", str(options.model.resolve()), "--precision", "bf16",
            "--config", str(folder / "config.yaml"), "--metric_file", str(folder / "metrics"),
        ]  # fmt: skip
        run(command, home, folder / "log.txt")
        figures = measured(folder / "log.txt", workload)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    commit = _commit(home)
    notes += [] if commit.startswith(COMMIT) else [f"the checkout is at commit {commit or 'unknown'}, not at {COMMIT}"]
    result = {"version": 1, "workload": workload.name, "workload_hash": workload.content_hash, "commit": commit}
    result |= figures | {"notes": [*NOTES, *notes], "command": shlex.join(command), "log": f"{folder}/log.txt"}
    write(options.out, json.dumps(result, indent=1) + "\n")
    return 0


def _commit(home: Path) -> str:
    """Of a checkout; empty where there is none, or no git to ask."""
    try:
        result = subprocess.run(["git", "-C", home, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


def installation() -> tuple[Path, Path]:
    """mLoRA's checkout and its interpreter, by the environment."""
    for name in ("LORAFUSION_MLORA_HOME", "LORAFUSION_MLORA_PYTHON"):
        if not os.environ.get(name):
            raise UserError(f"{name}: not set; baselines/mlora/external.py says what it names")
    # Not resolved: a virtual environment's interpreter is a link, and is told by where the link is.
    home, python = (Path(os.environ[f"LORAFUSION_MLORA_{name}"]).absolute() for name in ("HOME", "PYTHON"))
    if not (home / "mlora_train.py").is_file():
        raise UserError(f"LORAFUSION_MLORA_HOME: {home} has no mlora_train.py; expected a checkout of TUDB-Labs/mLoRA")
    if not os.access(python, os.X_OK) or python.is_dir():
        raise UserError(f"LORAFUSION_MLORA_PYTHON: {python} is not a program; expected mLoRA's Python interpreter")
    return home, python


def prepare(workload: Workload, model: Path, folder: Path) -> list[str]:
    """Write mLoRA's config, prompt and data to a folder; returns what a reader of the numbers must know."""
    for job in workload.jobs:
        if job.steps or job.start or MERGED in job.target_modules:
            raise UserError(f"job {job.name!r}: mLoRA trains whole epochs, from their start, and knows no {MERGED}")
    folder.mkdir(parents=True, exist_ok=True)
    texts = filler(model, {row_tokens(job, i) for job in workload.jobs for i in range(len(job.samples))})
    for job in workload.jobs:
        data = [{"text": texts[row_tokens(job, i)]} for i in range(len(job.samples))]
        write(folder / f"{job.name}.json", json.dumps(data))
    write(folder / "prompt.yaml", yaml.safe_dump({"template": "{{ data_point['text'] }}"}))
    write(folder / "config.yaml", yaml.safe_dump(config(workload, folder), sort_keys=False))
    notes = []
    if cut := sum(sample.tokens > LONGEST for job in workload.jobs for sample in job.samples):
        notes.append(f"{cut} samples are cut to {LONGEST} tokens, the end of its table of rotations")
    if bare := [job.name for job in workload.jobs if not job.dropout]:
        notes.append(f"dropout {LEAST_DROPOUT} in place of 0, which it refuses: {', '.join(bare)}")
    unknown = ("rslora", "weight_decay", "schedule", "warmup_steps", "max_grad_norm", "evaluate_every")
    for job in workload.jobs:
        ignored = [name for name in unknown if getattr(job, name) != Job.model_fields[name].default]
        ignored += [] if job.alpha.is_integer() else ["the fraction of alpha"]
        notes += [f"ignored of {job.name}, as mLoRA has none: {', '.join(ignored)}"] if ignored else []
    return notes


def config(workload: Workload, folder: Path) -> dict:
    """mLoRA's configuration file; every adapter is resident from the first iteration on."""
    jobs = workload.jobs
    return {
        "dispatcher": {"name": "default", "concurrency_num": len(jobs)},
        "datasets": [
            {"name": job.name, "data": str(folder / f"{job.name}.json"), "prompt": str(folder / "prompt.yaml"),
             "prompt_type": "instruction", "preprocess": "default"} for job in jobs
        ],
        "adapters": [
            {"name": job.name, "type": "lora", "path": str(folder / "adapters" / job.name), "optimizer": "adamw",
             "lr": job.learning_rate, "r": job.rank, "alpha": int(job.alpha), "dropout": job.dropout or LEAST_DROPOUT,
             "target_modules": {name: name in job.target_modules for name in ALL_LINEAR}} for job in jobs
        ],
        "tasks": [
            {"type": "train", "name": job.name, "adapter": job.name, "dataset": job.name, "num_epochs": job.epochs,
             "batch_size": job.global_batch_size, "mini_batch_size": job.global_batch_size, "cutoff_len": LONGEST,
             "save_step": 10**9} for job in jobs
        ],
    }  # fmt: skip


def row_tokens(job: Job, position: int) -> int:
    return min(job.sample_at(position).tokens, LONGEST)


def filler(model: Path, lengths: set[int]) -> dict[int, str]:
    """A text for each length that is so many tokens with <bos> and <eos>, by the model's tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {model}: no tokenizer ({str(error).splitlines()[0]})") from None
    if None in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        raise UserError(f"--model: {model}: mLoRA puts <bos> and <eos> around a sample; this tokenizer lacks one")
    for word, between in (("the", " "), ("a", " "), ("x", "")):
        texts = {length: between.join([word] * (length - AROUND)) for length in lengths}
        if all(len(tokenizer.encode(text, add_special_tokens=False)) == n - AROUND for n, text in texts.items()):
            return texts
    raise UserError(f"--model: {model}: no word that stays one token when it is repeated")


def run(command: list[str], home: Path, log: Path) -> None:
    """Run mLoRA to its end, its output to a log."""
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(log.parent / "cache")}
    with open(log, "w") as file:
        result = subprocess.run(command, cwd=home, env=settings, stdout=file, stderr=file)
    if result.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"])[-1]
        raise UserError(f"{log}: mLoRA ended with status {result.returncode}: {last}")


def measured(path: Path, workload: Workload) -> dict:
    """Losses, tokens and times by the lines of a log. A loss is printed once the device has computed it."""
    log, losses = path.read_text(errors="replace"), {job.name: [] for job in workload.jobs}
    times: dict[int, datetime] = {}  # when the last loss of an iteration was known
    for stamp, name, value in LOSS.findall(log):
        times[len(losses.setdefault(name, []))] = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f")
        losses[name].append(float(value))
    started = [name for _, name in STEP.findall(log)]
    for job in workload.jobs:
        if not len(losses[job.name]) == started.count(job.name) == len(job.batches):
            raise UserError(f"{path}: adapter {job.name}: expected {len(job.batches)} steps, found "
                            f"{started.count(job.name)}, with {len(losses[job.name])} losses")  # fmt: skip
    batches = max(map(len, losses.values()))
    running = [[job for job in workload.jobs if step < len(job.batches)] for step in range(batches)]
    rows = [[row_tokens(job, i) for job in jobs for i in job.batches[step]] for step, jobs in enumerate(running)]
    real, padded = [sum(row) for row in rows], [len(row) * math.ceil(max(row) / 8) * 8 for row in rows]
    seconds = (times[batches - 1] - times[0]).total_seconds()
    return {
        "iterations": batches,
        "losses": {name: [loss if math.isfinite(loss) else None for loss in values] for name, values in losses.items()},
        "tokens": sum(real),
        "tokens_padded": sum(padded),
        "seconds": seconds,
        "throughput": sum(real[1:]) / seconds if seconds else None,
        "throughput_padded": sum(padded[1:]) / seconds if seconds else None,
    }


if __name__ == "__main__":
    sys.exit(main())
