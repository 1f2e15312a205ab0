"""What README.md and the smaller documents quote: the headline, and what follows from the configuration."""

from __future__ import annotations

import json

import pytest

from lorafusion.core.config import read_model, read_systems
from lorafusion.data.blocks import MOST_LINE
from lorafusion.lab.checks.comparison import LOSS_TOLERANCE, MOST_LOSS_ERROR, MOST_WEIGHT_ERROR, WEIGHT_TOLERANCE
from lorafusion.lab.checks.gradients import MOST_ERROR, MOST_LENGTH_ERROR
from lorafusion.lab.checks.verdicts import read_verdict
from lorafusion.lab.cluster.site import Site
from lorafusion.lab.shared_jobs import groups_of
from lorafusion.lab.steps import dag_of
from lorafusion.lab.suite import cells, read_suite, suite_path
from lorafusion.lab.table.result import CLOCKS_AGREE
from lorafusion.lab.trials import SLOWER
from lorafusion.model.cudnn_attention import SIZES
from tests.numbers import end_to_end, sources
from tests.numbers.quoted import number, percent
from tests.torture import inputs
from tests.torture.__main__ import PARTS
from tests.torture.case import LONGEST_LINE, MOST_CPU, MOST_MEMORY, MOST_WALL, REFUSED


def readme() -> list[str]:
    speeds = end_to_end.speeds("lorafusion")
    return [
        f"train with {number(min(speeds), ',.0f')} to {number(max(speeds), ',.0f')} tokens a second",
        f"That is {number(end_to_end.headline().value, '.2f')} times as fast as with the best baseline",
    ]


def reproduce() -> list[str]:
    passages = []
    for name in ("smoke", "cpu-tiny", "h200", "h200-prompts", "paper-grid"):
        suite = read_suite(suite_path(name))
        count = len(cells(suite, suite_path(name)))
        passages.append(f"| {number(count)} × {number(suite.repeats)} |")
    return passages


def slurm_site() -> list[str]:
    """The jobs of the paper's grid; tests/lab/test_shared_jobs.py has Snakemake count them too."""
    counts = []
    for gpus_per_node in ("8", "4"):
        with pytest.MonkeyPatch.context() as patches:
            patches.setenv("LORAFUSION_SLURM_GPUS_PER_NODE", gpus_per_node)
            dag = dag_of("paper-grid")
        steps, shared = [step for step in dag.of_target("all") if not step.kind.quick], groups_of(dag, Site())
        counts.append(len(steps) - len(shared) + len(set(shared.values())))
    eight, four = map(number, counts)
    return [
        f"the {number(len(steps))} steps of the paper's grid are {eight} jobs on nodes of eight GPUs, and {four} on"
    ]


def jobs_file() -> list[str]:
    return [f"a line of more than {number(MOST_LINE >> 20)} MiB is an error"]


def systems() -> list[str]:
    model, rank, size = read_model("llama-3.1-8b"), 16, 2  # bytes of bfloat16
    shapes = model.linears.values()
    of_adapter = size * rank * model.num_hidden_layers * sum(one + other for one, other in shapes)
    of_model = size * (
        model.num_hidden_layers * sum(one * other for one, other in shapes) + 2 * model.vocab_size * model.hidden_size
    )
    return [
        f"rounded up to {number(read_systems()['mlora'].options['row_multiple'])} (`row_multiple",
        f"slower than the fastest by {percent(1 - SLOWER)} or more",
        *attention(),
        f"{number(of_adapter / 1e6, '.0f')} MB an adapter beside {number(of_model / 1e9, '.0f')} GB of Llama-3.1-8B",
    ]


def attention() -> list[str]:
    rows = sources.drawn(f"{sources.H200}/attention")
    rows["faster"], rows["equal_bits"] = (
        rows.flash_us / rows.cudnn_us,
        rows.flash_equal_bits_us / rows.cudnn_equal_bits_us,
    )
    price = rows.cudnn_equal_bits_us / rows.cudnn_us - 1
    mixed = rows[rows["row"].str.startswith("mixed")]
    forms = {"flash_us": ".0f", "cudnn_us": ".0f", "cudnn_tflops": ".0f", "faster": ".2f", "equal_bits": ".2f"}
    units = {"flash_us": " µs", "cudnn_us": " µs"}
    single = [
        " | ".join([f"| {number(row['samples'])} × {number(row['longest'])}",
                    *(number(row[name], form) + units.get(name, "") for name, form in forms.items())])
        for _, row in rows.drop(mixed.index).iterrows()
    ]  # fmt: skip
    spans = " | ".join(end_to_end.span(mixed[name], form) + units.get(name, "") for name, form in forms.items())
    heads, longest = 32, 8192
    return [
        f"{number(heads)} heads of {number(128)}, {number(8)} of keys, {number(longest)} tokens",
        *(f"{row} |" for row in single),
        f"| microbatches of the workload mixed | {spans} |",
        f"cost cuDNN {percent(price[rows['samples'] == 1].max())} with one sample and at most "
        f"{percent(price[rows['samples'] > 1].max())} with several",
        f"That is {number(2 * heads * longest**2 / 2**30, '.0f')} GiB with one sample of {number(longest)} tokens",
        f"heads of {', '.join(number(size) for size in SIZES[:-1])} or {number(SIZES[-1])} columns",
    ]


def robustness() -> list[str]:
    return [
        f"| status | {number(*REFUSED)} |",
        f"| a line of what it says | {number(LONGEST_LINE)} characters",
        f"beyond the start of the interpreter | {number(MOST_CPU, 'g')} s |",
        f"| time | {number(MOST_WALL, 'g')} s |",
        f"| memory | {number(MOST_MEMORY // 2**20)} GiB |",
        f"| faults of a training | {number(PARTS['training_kills'])} |",
        f"| damages to its folder | {number(PARTS['training_damage'])} |",
        f"| kills of a workflow | {number(PARTS['workflow_kills'])} |",
        f"| hostile inputs, over every command | {number(len(inputs.cases()))} |",
        *(f"| {part.replace('_', ' ')} | {number(run['tried'])} | {number(len(run['failures']))} | "
          f"{number(run['seconds'] / 60, '.1f')} |" for part, run in _whole_run().items()),
    ]  # fmt: skip


def _whole_run() -> dict[str, dict]:
    """What became of each part of torture."""
    recorded = json.loads((sources.REFERENCE / "cpu" / "torture.json").read_text())
    return {part: run for part, run in recorded.items() if part != "seed"}


def _largest(verdict: str, words: str) -> float:
    """Of a check's figures on the H200 whose names have these words at their end."""
    figures = read_verdict(sources.REFERENCE / sources.H200 / "checks" / verdict).figures
    return max(value for name, value in figures.items() if name.endswith(words) and "cuda" in name)


def measurements() -> list[str]:
    loss, tensor = (number(f"{bound:.0e}".replace("e-0", "e-")) for bound in (LOSS_TOLERANCE, WEIGHT_TOLERANCE))
    return [
        f"differ by at most {percent(CLOCKS_AGREE)}",
        f"| a loss, in float64 on a CPU | {loss} |",
        f"| a tensor, in float64 on a CPU | {tensor} |",
        f"| a loss, on a GPU | {number(MOST_LOSS_ERROR, 'g')} of the error of plain libraries |",
        f"| the weights of an adapter, on a GPU | {number(MOST_WEIGHT_ERROR, 'g')} of that error |",
        f"| a gradient, on a GPU | {number(MOST_ERROR, 'g')} of that error |",
        f"| the length of a linear's gradient, on a GPU | {percent(MOST_LENGTH_ERROR)} |",
        f"| `gradients` | at most {number(_largest('gradients.json', 'error over that of plain libraries'), '.2f')} of "
        f"the error; lengths within {percent(_largest('gradients.json', 'of the length'), '.2f')} |",
        f"| `lossless` | at most {number(_largest('lossless.json', 'of a tensor'), '.2f')} of the error |",
        f"| `systems` | at most {number(_largest('systems.json', 'of a tensor'), '.2f')} of the error |",
        *_predictions(),
    ]


def _predictions() -> list[str]:
    """The rows of the table of predicted times' errors, on a CPU."""
    data = sources.drawn(f"{sources.CPU}/validation")
    error, megatron = 100 * (data["ratio"] - 1).abs(), data["system"].str.startswith("megatron")
    rows = []
    for count, word in ((1, "one"), (2, "two"), (4, "four")):
        for name, chosen in (("PEFT, mLoRA and ours", ~megatron), ("Megatron's", megatron)):
            of = error[chosen & (data["gpus"] == count)]
            rows.append(f"| {word} | {name} | {number(len(of))} | {number(of.mean(), '.0f')} % | "
                        f"{number(of.max(), '.0f')} % |")  # fmt: skip
    return rows
