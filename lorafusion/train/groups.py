"""Jobs files of groups: parts of a jobs file that train on GPUs of their own, each by its own `lorafusion train`."""

import yaml

from lorafusion.train.config import TrainConfig


def group_file(
    config: TrainConfig, name: str, jobs: set[str], processes: int, data_parallel: int, checkpointing: bool
) -> str:
    """The jobs file of a group: the jobs of these names, everything else as the whole file has it. Its paths are
    absolute, and its output is the folder `name` in that of the whole file."""
    update: dict[str, object] = {
        "jobs": tuple(job for job in config.jobs if job.name in jobs),
        "processes": processes,
        "data_parallel": data_parallel,
        "output": config.output / name,
    }
    if checkpointing:
        update["checkpointing"] = "all"
    group = config.model_copy(update=update).model_dump(mode="json", exclude_unset=True, exclude={"path"})
    return yaml.safe_dump(group, sort_keys=False, allow_unicode=True)
