"""What an account or a QOS allows: whether a job alone is larger than what may be in use at once, and how long one may
be.

Such a job waits for ever, for a reason that passes for smaller ones.
"""

import getpass
import math
import re
from collections.abc import Callable

from lorafusion.core.schema import UserError
from lorafusion.lab.cluster.queue import Job, field, read_minutes, slurm
from lorafusion.lab.cluster.request import Resources, request_of
from lorafusion.lab.cluster.site import Site

KINDS = {"Cpu": "cpu", "CPU": "cpu", "GRES": "gres/", "Mem": "mem", "Memory": "mem", "Node": "node"}
# Where the limit of a reason stands: a column of `sacctmgr show`.
COLUMNS = {
    rf"QOSGrp({'|'.join(KINDS)})(Limit)?": ("qos", "GrpTRES"),
    rf"QOSMax({'|'.join(KINDS)})PerUser(Limit)?": ("qos", "MaxTRESPU"),
    rf"Max({'|'.join(KINDS)})PerAccount": ("qos", "MaxTRESPA"),
    rf"AssocGrp({'|'.join(KINDS)})(Limit)?": ("assoc", "GrpTRES"),
}
# Columns that limit how long a job may be: its minutes, or these times what it has in use.
WALLS = ("MaxWall", "GrpWall")
PRODUCTS = ("MaxTRESMins", "GrpTRESMins", "GrpTRESRunMins")
OF_USERS = ("MaxTRESRunMinsPU", "MaxTRESRunMinsPA")  # of a QOS alone
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
    if table == "qos":
        rows = _of_qos([field(text, "QOS"), _qos_of(field(text, "Partition"))], [column])
    else:
        rows = _of_account(field(text, "Account"), field(text, "UserId").partition("(")[0], [column])
    limits: dict[str, float] = {}
    for row in rows:
        for name, value in read_tres(row[column]).items():
            limits[name] = max(value, limits.get(name, value))
    return read_tres(field(text, "ReqTRES") or field(text, "TRES")), limits


def minutes_by_accounts(site: Site) -> Callable[[Resources], float]:
    """How long a job may be that needs something, by the smallest limit of those that may hold for it, as far as Slurm
    tells."""
    try:
        rows = _rows_of(site)
    except UserError:  # no accounts are kept, or not shown
        rows = []
    wall = min((read_minutes(row[column]) for row in rows for column in WALLS), default=math.inf)
    products = [read_tres(row[column]) for row in rows for column in (*PRODUCTS, *OF_USERS) if column in row]

    def minutes(needs: Resources) -> float:
        asked = request_of(needs, site)
        used = {"cpu": needs.nodes * asked["cpus_per_task"], "node": needs.nodes, "gres/gpu": needs.nodes * needs.gpus,
                "mem": needs.nodes * asked["mem_mb"]}  # fmt: skip
        return min([wall, *[limits[name] / used[name] for limits in products for name in used.keys() & limits if
                            used[name]]])  # fmt: skip

    return minutes


def _rows_of(site: Site) -> list[dict[str, str]]:
    """The limits that may hold for the site's jobs, by columns."""
    user = getpass.getuser()
    account = (
        site.account or _sacctmgr("user", "where", f"name={user}", columns=["DefaultAccount"])[0]["DefaultAccount"]
    )
    rows = _of_account(account, user, ["DefaultQOS", *WALLS, *PRODUCTS])
    names = [site.qos or next((row["DefaultQOS"] for row in rows if row["DefaultQOS"]), "normal")]
    for partitions in {site.partition, site.cpu_partition}:
        names += [_qos_of(name) for name in partitions.split(",")] if partitions else []
    return rows + _of_qos(names, [*WALLS, *PRODUCTS, *OF_USERS])


def _of_account(account: str, user: str, columns: list[str]) -> list[dict[str, str]]:
    """The rows of an account itself, which have no user, and of a user in it."""
    rows = _sacctmgr("assoc", "where", f"account={account}", columns=["User", *columns])
    return [row for row in rows if row["User"] in ("", user)]


def _of_qos(names: list[str], columns: list[str]) -> list[dict[str, str]]:
    return _sacctmgr("qos", "where", f"name={','.join(dict.fromkeys(filter(None, names)))}", columns=columns)


def _qos_of(partition: str) -> str:
    """The name of a partition's QOS, if it has one."""
    name = field(slurm("scontrol", "--oneliner", "show", "partition", partition), "QoS")
    return "" if name == "N/A" else name


def _sacctmgr(*words: str, columns: list[str]) -> list[dict[str, str]]:
    """The rows that sacctmgr shows, by columns."""
    answer = slurm("sacctmgr", "--noheader", "--parsable2", "show", *words, f"format={','.join(columns)}")
    rows = [line.split("|") for line in answer.splitlines()]
    return [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]


def read_tres(text: str) -> dict[str, float]:
    """Of `cpu=4,mem=100G,gres/gpu=8`; memory in MB."""
    parts = re.findall(r"([^=,]+)=(\d+(?:\.\d+)?)([KMGTP]?)", text)
    return {name: float(value) * UNITS[unit or "M"] for name, value, unit in parts}
