"""A trained adapter for others to use: PEFT's format, with a card that says what it is and how it was trained."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from lorafusion.config import ModelConfig
from lorafusion.files import write
from lorafusion.models.lora import peft_config, save_adapter
from lorafusion.train.metrics import Step
from lorafusion.workload import Job

STOPPED = "\n**Stopped at step {step}: its gradient was not finite. These are the weights before.**\n"
CARD = """---
library_name: peft
{base_model}tags:
- lora
- lorafusion
---
# {name}

A LoRA adapter of {base}, trained with LoRAFusion beside {others} other(s), exactly as it would have been trained alone.
{stopped}
| | |
|---|---|
{rows}

![loss](loss.png)

`training.json` has every step. To use it:

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "{name}")
```
"""


def export(
    job: Job, model: ModelConfig, state: Path, steps: dict[int, Step], *, stopped: bool, others: int, folder: Path
) -> None:
    """Write the adapter of a job to `folder`: adapter_model.safetensors, adapter_config.json, README.md, training.json
    and loss.png. state: the file that `lorafusion.runtime.checkpoint.adapters_of` wrote. stopped: is it of the weights
    before a gradient that was not finite? others: the jobs beside it."""
    weights = {
        name.removesuffix("/weight"): value for name, value in load_file(state).items() if name.endswith("/weight")
    }
    config = peft_config(job)
    config.base_model_name_or_path = None if model.weights == "random" else model.weights
    config.inference_mode = True
    save_adapter(config, weights, folder)
    settings = job.model_dump(mode="json", exclude={"samples", "evaluation", "start"})
    described = {
        "job": settings | {"samples": len(job.samples), "evaluation_samples": len(job.evaluation)},
        "base_model": model.model_dump(mode="json"), "stopped": stopped,
        "steps": [{"step": step + 1} | row.known for step, row in steps.items()],
    }  # fmt: skip
    write(folder / "training.json", json.dumps(described, indent=1) + "\n")
    write(folder / "README.md", _card(job, model, steps, stopped, others))
    if steps:
        _draw(job, steps, folder / "loss.png")


def _card(job: Job, model: ModelConfig, steps: dict[int, Step], stopped: bool, others: int) -> str:
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
    known = model.weights != "random"
    return CARD.format(
        name=job.name,
        base=model.weights if known else f"a {model.architecture} with random weights",
        base_model=f"base_model: {model.weights}\n" if known else "",
        others=others,
        stopped=STOPPED.format(step=len(steps) + 1) if stopped else "",
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )


def _draw(job: Job, steps: dict[int, Step], path: Path) -> None:
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
