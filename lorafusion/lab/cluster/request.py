"""What a job needs, and what Slurm is asked for it."""

from typing import NamedTuple

from lorafusion.lab.cluster.site import Site

PHYSICAL = "--hint=nomultithread"  # also for srun, to which the plugin does not hand on what sbatch was told


class Resources(NamedTuple):
    """What a job needs. memory_mb, cpus and gpus: of each node; exclusive: nothing else may disturb its clock;
    whole_nodes: these are all GPUs of its nodes, as its suite has them."""

    minutes: int
    memory_mb: int
    cpus: int = 1
    gpus: int = 0
    nodes: int = 1
    exclusive: bool = True
    whole_nodes: bool = False


def nodes_for(processes: int, per_node: int) -> int:
    """The fewest nodes on which so many processes find room, the same number on each."""
    return next(nodes for nodes in range(-(-processes // per_node), processes + 1) if processes % nodes == 0)


def request_of(needs: Resources, site: Site) -> dict[str, int | str | None]:
    """The resources of a job as Snakemake's Slurm plugin knows them; what is None is not asked for, nor is memory of 0.

    A timed job has its GPUs and their cores for itself, or whole nodes where the site says so or it takes all GPUs.
    """
    at_gpus = bool(needs.gpus) or site.cpu_partition is None
    all_gpus = needs.whole_nodes or needs.gpus == site.gpus_per_node
    whole_nodes = needs.exclusive and (site.exclusive or all_gpus)
    hint = PHYSICAL if site.physical_cores else ""
    reservation = f"--reservation={site.reservation}" if site.reservation and at_gpus else ""
    extra = filter(None, ["--exclusive" if whole_nodes else "", hint, reservation, site.extra])
    cpus = max(needs.cpus, needs.gpus * site.cpus_per_gpu)
    # --wait=0: a node may end late, whatever the cluster's WaitTime.
    launcher = filter(None, ["srun", "--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={cpus}", hint])
    return {
        "runtime": needs.minutes,
        "mem_mb": _memory_mb(needs, site, whole_nodes),
        "cpus_per_task": cpus,
        "tasks_per_gpu": 0,
        "gres": ":".join(filter(None, ["gpu", site.gpu_type, str(needs.gpus)])) if needs.gpus else None,
        # Of one node nothing is said: Snakemake would add up the nodes of jobs that it groups.
        "nodes": needs.nodes if needs.nodes > 1 else None,
        "tasks": needs.nodes if needs.nodes > 1 else None,
        # What starts a run: nothing on one node, one launcher a node on more; one that cannot start ends the others.
        # srun does not inherit the cores of a task, and would bind a launcher to one.
        "mpi": " ".join(launcher) if needs.nodes > 1 else "",
        "slurm_account": site.account,
        "slurm_partition": site.partition if at_gpus else site.cpu_partition,
        "qos": site.qos,
        "constraint": site.constraint if at_gpus else None,
        "slurm_extra": " ".join(extra) or None,
    }


def _memory_mb(needs: Resources, site: Site, whole_nodes: bool) -> int:
    """Of each node: what is needed, or all that a whole node has; none where the site keeps no account of it."""
    if site.memory_gb is None:
        return needs.memory_mb
    if site.memory_gb == 0:
        return 0
    return max(needs.memory_mb, 1000 * site.memory_gb if whole_nodes else 0)
