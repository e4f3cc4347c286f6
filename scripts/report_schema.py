"""Prints the JSON schema of report.json: ``python scripts/report_schema.py > docs/report.schema.json``."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from lrc.records.compression import REPORT_VERSION, REPORTS


class _Schema(GenerateJsonSchema):
    """Numbers that JSON has not are written as words."""

    def float_schema(self, schema: core_schema.FloatSchema) -> dict[str, Any]:
        """A number, or the name of one."""
        return {"anyOf": [super().float_schema(schema), {"enum": ["inf", "-inf", "nan"]}]}


def report_schema() -> str:
    """The schema of the present version as JSON."""
    schema = REPORTS.json_schema(mode="serialization", schema_generator=_Schema)
    schema["title"] = "report.json of lrc"
    for record in (schema, *schema["$defs"].values()):
        record["required"] = [*record["properties"]]  # a report is written with all of them
    schema["properties"]["version"] = {"const": REPORT_VERSION}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    print(report_schema(), end="")
