"""Whether a job alone is larger than what its account, or a user of its QOS, may have in use at once.

Such a job waits for ever, for a reason that passes for smaller ones.
"""

from __future__ import annotations

import re

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.queue import Job, field, slurm

KINDS = {"Cpu": "cpu", "CPU": "cpu", "GRES": "gres/", "Mem": "mem", "Memory": "mem", "Node": "node"}
# Where the limit of a reason stands: a column of `sacctmgr show`.
COLUMNS = {
    rf"QOSGrp({'|'.join(KINDS)})(Limit)?": ("qos", "GrpTRES"),
    rf"QOSMax({'|'.join(KINDS)})PerUser(Limit)?": ("qos", "MaxTRESPU"),
    rf"Max({'|'.join(KINDS)})PerAccount": ("qos", "MaxTRESPA"),
    rf"AssocGrp({'|'.join(KINDS)})(Limit)?": ("assoc", "GrpTRES"),
}
UNITS = {"K": 2**-10, "M": 1, "G": 2**10, "T": 2**20, "P": 2**30}  # MB


def excess(job: Job) -> str:
    """What of a waiting job is too large for the limit that it waits for, and how large it may be; empty if nothing is,
    or Slurm does not tell."""
    for pattern, (table, column) in COLUMNS.items():
        if match := re.fullmatch(pattern, job.reason):
            try:
                wanted, limits = _wanted_and_limits(job, table, column)
            except UserError:
                return ""
            for name, value in wanted.items():
                if name.startswith(KINDS[match[1]]) and value > limits.get(name, value):
                    return f"it asks for {name}={value:.10g}, and {limits[name]:.10g} is all that may be in use at once"
    return ""


def _wanted_and_limits(job: Job, table: str, column: str) -> tuple[dict[str, float], dict[str, float]]:
    """What a job asks for, and the largest limit of those that may hold for it."""
    text = slurm("scontrol", "--oneliner", "show", "job", job.id)
    where = [table, "where", f"account={field(text, 'Account')}", f"format=user,{column}"]
    if table == "qos":
        partition = slurm("scontrol", "--oneliner", "show", "partition", field(text, "Partition"))
        where = [table, "where", f"name={field(text, 'QOS')},{field(partition, 'QoS')}", f"format={column}"]
    users = ("", field(text, "UserId").partition("(")[0])  # the account's own limits have no user
    limits: dict[str, float] = {}
    for line in slurm("sacctmgr", "--noheader", "--parsable2", "show", *where).splitlines():
        user, _, text_of_limits = line.rpartition("|")
        for name, value in read_tres(text_of_limits).items() if user in users else ():
            limits[name] = max(value, limits.get(name, value))
    return read_tres(field(text, "ReqTRES") or field(text, "TRES")), limits


def read_tres(text: str) -> dict[str, float]:
    """Of `cpu=4,mem=100G,gres/gpu=8`; memory in MB."""
    parts = re.findall(r"([^=,]+)=(\d+(?:\.\d+)?)([KMGTP]?)", text)
    return {name: float(value) * UNITS[unit or "M"] for name, value, unit in parts}
