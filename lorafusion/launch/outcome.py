"""How a run ended. Apart from the launcher, so that who reads results need not load it."""

from dataclasses import dataclass, field

from lorafusion.core.schema import UserError


@dataclass(frozen=True)
class Outcome:
    """How a run ended: a status of the measurement table, why, and the report of rank 0 where there is one. killed: by
    SIGKILL from outside, which says nothing of the run."""

    status: str
    note: str = ""
    report: dict = field(default_factory=dict)
    killed: bool = False

    @property
    def without_graphs(self) -> str:
        """Why stages that were to replay graphs did not; empty where there are none."""
        reasons = {part for part in self.report.get("graphs", []) if isinstance(part, str) and part}
        return "; ".join(f"without graphs: {reason}" for reason in sorted(reasons))


class FaultyRunError(UserError):
    """A run that ended by itself and has no numbers all the same: its status in the measurement table, and why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
