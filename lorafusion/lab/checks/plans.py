"""Check: every plan trains what its workload says."""

from pathlib import Path

from lorafusion.core.plan import Plan, check
from lorafusion.core.schema import UserError
from lorafusion.core.workload import Workload
from lorafusion.lab.checks.verdicts import Verdict


def check_plans(paths: list[Path], workloads: list[Path]) -> Verdict:
    """Every plan passes the checker against its workload; raises `PlanError` at the first that does not."""
    by_hash = {workload.content_hash: workload for workload in map(Workload.read, workloads)}
    microbatches = noops = 0
    for path in paths:
        plan = Plan.read(path)
        if plan.workload_hash not in by_hash:
            raise UserError(f"{path}: made for workload {plan.workload_hash}, which is not among those given")
        check(plan, by_hash[plan.workload_hash], source=path)
        microbatches += plan.statistics.microbatches
        noops += plan.statistics.noops
    return Verdict(
        check="plans",
        passed=True,
        statement="every plan: each sample once an epoch, exact steps, capacity, the dependency rule",
        figures={"plans": len(paths), "microbatches": microbatches, "no-ops": noops},
    )
