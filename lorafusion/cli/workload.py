"""`lorafusion workload`: draw the jobs of a workload."""

from typing import Annotated

import typer

from lorafusion.cli.common import CommandLine, Out
from lorafusion.core.config import config_path
from lorafusion.core.files import write
from lorafusion.core.schema import LEAST_SCALE, MOST_SAMPLES, MOST_SCALE, MOST_SEED

workload_app = CommandLine()


@workload_app.command("workload", example="lorafusion workload mixed --samples 100 --out workload.json")
def workload(
    config: Annotated[str, typer.Argument(help="a name of configs/workloads, or such a file")],
    out: Out,
    samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="samples of an adapter")] = 1000,
    global_batch: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="samples of one optimizer step")] = 8,
    length_scale: Annotated[
        float, typer.Option(min=LEAST_SCALE, max=MOST_SCALE, help="divides the sample lengths")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="draws the lengths")] = 1,
    merged_qkv: Annotated[bool, typer.Option("--merged-qkv", help="one adapter for q, k and v as one linear")] = False,
) -> None:
    """Draw a workload: adapters, and the lengths of their samples as in the datasets of the paper."""
    from lorafusion.data.lengths import make_workload

    drawn = make_workload(
        config_path("workload", config),
        samples=samples,
        global_batch=global_batch,
        scale=length_scale,
        seed=seed,
        merged_qkv=merged_qkv,
    )
    write(out, drawn.to_json())
    print(f"{out}: {len(drawn.jobs)} adapters, {drawn.tokens} tokens, hash {drawn.content_hash}")
