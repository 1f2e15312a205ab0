"""A trained adapter for others to use: PEFT's format, with a card that says what it is and how it was trained."""

import json
import logging
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorafusion.core.config import ModelConfig
from lorafusion.core.files import write, writing
from lorafusion.core.manifest import DamagedError, entries, facts_of
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Job, Workload
from lorafusion.engine.checkpoint import adapter_state, last_written, opened
from lorafusion.model.lora import peft_config, save_adapter
from lorafusion.train.folder import Exported, OutputFolder, Run
from lorafusion.train.metrics import History, StepMetrics

LOGGER = logging.getLogger(__name__)
STOPPED = "\n**Stopped at step {step}: its gradient was not finite. These are the weights before.**\n"
CARD = """---
{front_matter}---
# {name}

A LoRA adapter of {base}, trained with LoRAFusion beside {others} other(s), exactly as it would have been trained alone.
{stopped}
| | |
|---|---|
{rows}
{picture}
`training.json` has every step. To use it:

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "{folder}")
```
"""


EXACT = ("adapter_model.safetensors", "adapter_config.json", "training.json")
COMPANIONS = ("README.md",)  # which their owner may write anew


class Exporter:
    """Writes each job's adapter when the job has ended, while the others train on; once, however often the training is
    interrupted. One that cannot be written hinders no other."""

    def __init__(self, output: OutputFolder, model: ModelConfig, workload: Workload, history: History) -> None:
        self.output, self.model, self.workload, self.history = output, model, workload, history
        self.failures: dict[str, str] = {}
        self._seen: Path | None = None

    def look(self, run: Run) -> list[str]:
        """Export the jobs that have ended by the newest checkpoint of a run under way; their names."""
        try:
            path = last_written(run.checkpoints)
            if path is None or path == self._seen:
                return []
            steps = facts_of(path)["steps"]
            due = [job for job in self._pending if steps.get(job.name) == len(job.batches)]
            if not due:
                self._seen = path
                return []
            checkpoint = opened(path)
            for job in due:
                self._try(job, len(job.batches), checkpoint.stopped.get(job.name), adapter_state(checkpoint, job.name))
        except (UserError, OSError):
            return []  # it has just been removed for a newer one; at the next look, or at the end
        self._seen = path
        return [job.name for job in due]

    def finish(self) -> None:
        """Export the jobs that have ended in runs that were left."""
        self.failures.clear()
        for job in self._pending:
            done = self.output.progress.jobs.get(job.name)
            if done is not None and (done.steps == len(job.batches) or done.stopped is not None):
                self._try(job, done.steps, done.stopped)

    @property
    def _pending(self) -> list[Job]:
        return [job for job in self.workload.jobs if not self.is_done(job) and job.name not in self.failures]

    def is_done(self, job: Job) -> bool:
        """Has the adapter been written, and is it there as it was?"""
        exported, folder = self.output.progress.exported.get(job.name), self.output.adapter(job.name)
        if exported is None or any(not (folder / name).is_file() for name in COMPANIONS):
            return False
        try:
            for name, entry in exported.files.items():
                entry.require(folder / name)
        except DamagedError:
            return False
        return True

    def _try(self, job: Job, steps: int, stopped: int | None, state: dict[str, torch.Tensor] | None = None) -> None:
        """Export a job after so many steps; without a state, that which was kept of it."""
        try:
            state = state or load_file(self.output.state_of(job.name))
            self._export(job, steps, stopped, state)
        except (UserError, OSError, SafetensorError) as error:
            self.failures[job.name] = " ".join(str(error).split())[:150]
            LOGGER.warning(f"{job.name} could not be exported: {self.failures[job.name]}")

    def _export(self, job: Job, steps: int, stopped: int | None, state: dict[str, torch.Tensor]) -> None:
        """Write the adapter beside its place, put it there, and note it."""
        self.history.require(job.name, steps)
        rows = self.history.complete(job.name)
        rows = {step: row for step, row in rows.items() if stopped is None or step < stopped}
        weights = {name.removesuffix("/weight"): value for name, value in state.items() if name.endswith("/weight")}
        folder = self.output.adapter(job.name)
        partial = folder.with_name(f".{job.name}.partial")
        for path in (folder, partial):
            if path.is_symlink():
                raise UserError(f"{path}: a link, expected a folder of the training's own")
        shutil.rmtree(partial, ignore_errors=True)
        with writing(folder):
            export(job, self.model, weights, rows, stopped=stopped is not None, others=len(self.workload.jobs) - 1,
                   folder=partial)  # fmt: skip
        files = entries(partial, EXACT)
        if folder.exists():  # then its other files stay
            for path in partial.iterdir():
                path.replace(folder / path.name)
            partial.rmdir()
        else:
            partial.rename(folder)
        exported = self.output.progress.exported | {job.name: Exported(steps=steps, files=files)}
        self.output.update(exported=exported)
        LOGGER.info(str(folder))


def export(
    job: Job,
    model: ModelConfig,
    weights: dict[str, torch.Tensor],
    steps: dict[int, StepMetrics],
    *,
    stopped: bool,
    others: int,
    folder: Path,
) -> None:
    """Write the adapter of a job to `folder`: adapter_model.safetensors, adapter_config.json, README.md, training.json
    and, where matplotlib is installed, loss.png. weights: by PEFT's names. stopped: is it of the weights before a
    gradient that was not finite? others: the jobs beside it."""
    config = peft_config(job)
    if model.weights != "random":
        config.base_model_name_or_path, config.revision = model.weights, model.revision
    config.inference_mode = True
    save_adapter(config, weights, folder)
    settings = job.model_dump(mode="json", exclude={"samples", "evaluation", "start"})
    local = Path(model.weights)  # where it lies, if it was not moved meanwhile, is nobody's business
    if local.is_absolute() or local.is_dir():
        model = model.model_copy(update={"weights": f"./{local.resolve().name}"})
    described = {
        "job": settings | {"samples": len(job.samples), "evaluation_samples": len(job.evaluation)},
        "base_model": model.model_dump(mode="json"), "stopped": stopped,
        "steps": [{"step": step + 1} | row.values for step, row in steps.items()],
    }  # fmt: skip
    write(folder / "training.json", json.dumps(described, indent=1) + "\n")
    if steps and find_spec("matplotlib"):
        _draw(job, steps, folder / "loss.png")
    picture = "\n![loss](loss.png)\n" if (folder / "loss.png").exists() else ""
    write(folder / "README.md", _card(job, model, steps, stopped, others, picture))


def _card(job: Job, model: ModelConfig, steps: dict[int, StepMetrics], stopped: bool, others: int, picture: str) -> str:
    losses = [row.loss for row in steps.values()]
    evaluations = [row.evaluation for row in steps.values() if row.evaluation is not None]
    rows = {
        "dataset": f"{job.dataset}, {len(job.samples)} samples, {job.epochs} epoch(s)",
        "steps": f"{len(steps)} of {job.global_batch_size} samples, {sum(row.tokens for row in steps.values())} tokens",
        "rank, alpha, dropout": f"{job.rank}, {job.alpha:g}, {job.dropout:g}{', rsLoRA' if job.rslora else ''}",
        "target modules": ", ".join(job.target_modules),
        "AdamW": f"learning rate {job.learning_rate:g}, {job.schedule} after {job.warmup_steps} steps of warm-up, "
        f"weight decay {job.weight_decay:g}, gradient clipped to {job.max_grad_norm}",
        "loss": f"{losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last" if losses else "no step was made",
        "evaluation loss": f"{evaluations[-1]:.4f} ({len(job.evaluation)} samples)" if evaluations else "not measured",
        "seed": job.seed,
    }
    base, front_matter = f"a {model.architecture} with random weights", {"library_name": "peft"}
    if model.weights != "random":
        base = f"{model.weights}{f', revision {model.revision}' if model.revision else ''}"
        if model.weights.startswith("./"):
            base = f"the model in a folder {Path(model.weights).name}"
        else:
            front_matter["base_model"] = model.weights
    return CARD.format(
        name=_escaped(job.name),
        folder=job.name,
        base=_escaped(base),
        front_matter=yaml.safe_dump(front_matter | {"tags": ["lora", "lorafusion"]}, sort_keys=False),
        others=others,
        picture=picture,
        stopped=STOPPED.format(step=len(steps) + 1) if stopped else "",
        rows="\n".join(f"| {key} | {_escaped(str(value))} |" for key, value in rows.items()),
    )


def _escaped(text: str) -> str:
    """A text in which Markdown and HTML see no marks of theirs."""
    return re.sub(r"([\\`*\[\]<>|~&$#]|\b_|_\b)", r"\\\1", " ".join(text.split()))


def _draw(job: Job, steps: dict[int, StepMetrics], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    axes.plot([step + 1 for step in steps], [row.loss for row in steps.values()], lw=1, label="training")
    evaluated = {step + 1: row.evaluation for step, row in steps.items() if row.evaluation is not None}
    if evaluated:
        axes.plot(evaluated.keys(), evaluated.values(), "o-", ms=3, label="evaluation")
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="loss of a token", title=job.name)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
