"""The JSON schema of a jobs file, by which an editor checks and completes it."""

from __future__ import annotations

import json

from lorafusion.train.config import TrainConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def jobs_schema() -> str:
    """The schema as text: of a file as it is written, with defaults for all jobs, and without the path of its own that
    the reader adds."""
    schema = _without_titles(TrainConfig.model_json_schema())
    del schema["properties"]["path"]
    schema["required"].remove("path")
    schema["description"] = "A jobs file of `lorafusion train`."
    job = schema["$defs"]["TrainJob"]
    job["required"] = ["name"]  # the defaults may have the rest
    schema["properties"]["defaults"] = {
        "type": ["object", "null"],
        "properties": {name: field for name, field in job["properties"].items() if name != "name"},
        "additionalProperties": False,
        "description": "what holds for every job that does not say otherwise",
    }
    return json.dumps({"$schema": DIALECT} | schema, indent=1) + "\n"


def _without_titles(node: dict) -> dict:
    """Without the titles that pydantic makes of the names of fields and classes."""
    return {
        key: _without_titles(value)
        if isinstance(value, dict)
        else [_without_titles(item) if isinstance(item, dict) else item for item in value]
        if isinstance(value, list)
        else value
        for key, value in node.items()
        if key != "title" or isinstance(value, dict)
    }
