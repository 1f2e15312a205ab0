"""The schemas of the configuration files as JSON Schema, for editors and readers; the models are the source."""

from __future__ import annotations

import json
from pathlib import Path

from lorafusion.core.config import ModelConfig, SystemConfig
from lorafusion.core.files import write
from lorafusion.data.lengths import WorkloadConfig
from lorafusion.lab.suite import Suite

SCHEMAS = {
    "suite": Suite.model_json_schema,
    "model": ModelConfig.model_json_schema,
    "workload": WorkloadConfig.model_json_schema,
    "system": SystemConfig.model_json_schema,
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_text(name: str) -> str:
    return json.dumps({"$schema": DIALECT} | SCHEMAS[name](), indent=2) + "\n"


def write_schemas(folder: Path) -> list[Path]:
    """Write each schema to `folder`; returns the files."""
    files = schema_files(folder)
    for name, path in files.items():
        write(path, schema_text(name))
    return list(files.values())


def schema_files(folder: Path) -> dict[str, Path]:
    """The file of each schema in a folder."""
    return {name: folder / f"{name}.schema.json" for name in SCHEMAS}
