"""The JSON schema of a jobs file, by which an editor checks and completes it."""

import json

from lorafusion.train.config import TrainConfig
from lorafusion.train.other_tools import BATCH, KEYS, VALUES

JOB = "#/$defs/TrainJob"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def jobs_schema() -> str:
    """The schema as text: of a file as it is written, with defaults for all jobs, and without the path of its own that
    the reader adds."""
    schema = _without_titles(TrainConfig.model_json_schema())
    del schema["properties"]["path"]
    schema["description"] = "A jobs file of `lorafusion train`."
    job = schema["$defs"]["TrainJob"]
    job["properties"] |= {
        key: {"description": "times the other one and data_parallel: global_batch_size"} for key in BATCH
    }
    linears = job["properties"]["target_modules"]
    linears["anyOf"] = [{key: linears.pop(key) for key in ("type", "items", "minItems")}, {"type": "string"}]
    linears["description"] = "names, all-linear, or a regular expression"
    # A file may leave out what it has under another tool's key, and a job what the defaults have.
    schema["required"], job["required"] = ["jobs"], ["name"]
    for place, properties in (("#", schema["properties"]), (JOB, job["properties"])):
        properties |= {
            theirs: ({} if theirs in VALUES else {"$ref": f"{place}/properties/{ours}"})
            | {"description": f"means {ours}"}
            for ours, every in KEYS.items()
            if ours in properties
            for theirs in every
        }
    schema["properties"]["defaults"] = {
        "type": ["object", "null"],
        "properties": {name: {"$ref": f"{JOB}/properties/{name}"} for name in job["properties"] if name != "name"},
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
