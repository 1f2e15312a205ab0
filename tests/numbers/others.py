"""What README.md and the smaller documents quote: the headline, and what follows from the configuration."""

from __future__ import annotations

from lorafusion.core.config import read_model, read_systems
from lorafusion.lab.checks.comparison import LOSS_TOLERANCE, MOST_LOSS_ERROR, MOST_WEIGHT_ERROR, WEIGHT_TOLERANCE
from lorafusion.lab.checks.gradients import MOST_ERROR, MOST_LENGTH_ERROR
from lorafusion.lab.checks.verdicts import read_verdict
from lorafusion.lab.suite import cells, read_suite, suite_path
from lorafusion.lab.table.result import CLOCKS_AGREE
from lorafusion.lab.trials import SLOWER
from tests.numbers import end_to_end, sources
from tests.numbers.quoted import number, percent


def readme() -> list[str]:
    speeds = end_to_end.speeds("lorafusion")
    return [
        f"train with {number(min(speeds), ',.0f')} to {number(max(speeds), ',.0f')} tokens a second, "
        f"{number(end_to_end.headline().value, '.2f')} times as fast as with the best baseline",
    ]


def artifact() -> list[str]:
    passages = []
    for name in ("smoke", "h200", "paper"):
        suite = read_suite(suite_path(name))
        count = len(cells(suite, suite_path(name)))
        passages.append(f"| {number(count)} × {number(suite.repeats)} |")
    return passages


def baselines() -> list[str]:
    model, rank, size = read_model("llama-3.1-8b"), 16, 2  # bytes of bfloat16
    shapes = model.linears.values()
    of_adapter = size * rank * model.num_hidden_layers * sum(one + other for one, other in shapes)
    of_model = size * (
        model.num_hidden_layers * sum(one * other for one, other in shapes) + 2 * model.vocab_size * model.hidden_size
    )
    return [
        f"rounded up to {number(read_systems()['mlora'].options['row_multiple'])} (`row_multiple",
        f"slower than the fastest by {percent(1 - SLOWER)} or more",
        f"{number(of_adapter / 1e6, '.0f')} MB an adapter beside {number(of_model / 1e9, '.0f')} GB of Llama-3.1-8B",
    ]


def _largest(verdict: str, words: str) -> float:
    """Of a check's figures on the H200 whose names have these words at their end."""
    figures = read_verdict(sources.REFERENCE / sources.H200 / "checks" / verdict).figures
    return max(value for name, value in figures.items() if name.endswith(words) and "cuda" in name)


def measuring() -> list[str]:
    loss, tensor = (number(f"{bound:.0e}".replace("e-0", "e-")) for bound in (LOSS_TOLERANCE, WEIGHT_TOLERANCE))
    return [
        f"differ by at most {percent(CLOCKS_AGREE)}.",
        f"a loss may differ by {loss}, a tensor by {tensor}.",
        f"a loss may have {number(MOST_LOSS_ERROR, 'g')} of it, an adapter's weights "
        f"{number(MOST_WEIGHT_ERROR, 'g')}, a "
        f"gradient {number(MOST_ERROR, 'g')}, and a linear's gradients may be {percent(MOST_LENGTH_ERROR)} too long",
        f"at most {number(_largest('gradients.json', 'error over that of plain libraries'), '.2f')} of the error of",
        f"a linear's are at most {percent(_largest('gradients.json', 'of the length'), '.2f')} too long or too short",
        f"clipped have at most {number(_largest('lossless.json', 'of a tensor'), '.2f')} of that error",
        f"whose tensors had {number(_largest('systems.json.failed', 'of a tensor'), '.2f')}:",
    ]
