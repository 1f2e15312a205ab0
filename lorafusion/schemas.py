"""The schemas of the configuration files as JSON Schema, for editors and readers; the models are the source."""

from __future__ import annotations

import json
from pathlib import Path

from lorafusion.config import ModelConfig, Suite, SystemConfig
from lorafusion.data.lengths import WorkloadConfig

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
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in SCHEMAS:
        path = folder / f"{name}.schema.json"
        path.write_text(schema_text(name))
        paths.append(path)
    return paths
