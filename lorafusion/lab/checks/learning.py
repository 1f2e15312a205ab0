"""Check: adapters learn."""

from collections.abc import Sequence

from lorafusion.core.workload import Workload
from lorafusion.lab.checks.comparison import smallest_b
from lorafusion.lab.checks.toy_runs import EXACT, Setup, setups_of, toy_jobs, train
from lorafusion.lab.checks.verdicts import Curve, Evidence, Verdict
from lorafusion.lab.suite import Suite

SYSTEM = "lorafusion"
MOST_LAST_LOSS = 0.5  # over the first


def check_suite(suite: Suite) -> tuple[Verdict, list[Curve]]:
    return learning(setups_of(suite)), []


def learning(setups: Sequence[Setup] = (EXACT,)) -> Verdict:
    """On a toy language the weights change and every adapter's loss falls to half or less, on the tiny model."""
    jobs = tuple(job.model_copy(update={"epochs": 20}) for job in toy_jobs(learning_rate=3e-2))
    evidence = Evidence()
    for setup in setups:
        if setup.model != EXACT.model:  # a large one has words to learn for longer than a check may take
            continue
        result = train(Workload(name="check", jobs=jobs), SYSTEM, setup=setup)
        ratio = max(losses[-1] / losses[0] for losses in result.losses.values())
        evidence.add(f"largest ratio of last to first loss ({setup})", ratio, MOST_LAST_LOSS)
        smallest = min(map(smallest_b, result.weights.values()))
        evidence.add(f"smallest norm of a trained B, zero at the start ({setup})", smallest)
        evidence.require(smallest > 0)
    statement = f"{SYSTEM}: on a toy language every adapter's loss falls to less than half and its weights change"
    return evidence.verdict("learning", statement)
