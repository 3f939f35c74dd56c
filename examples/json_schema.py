"""Get an answer as JSON of a schema, with the `openai` client: python examples/json_schema.py [URL]."""

import json
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "kind": {"enum": ["book", "film", "song"]},
    },
    "required": ["name", "year", "kind"],
    "additionalProperties": False,
}

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
answer = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Describe a work of art as JSON with name, year and kind."}],
    response_format={"type": "json_schema", "json_schema": {"name": "work", "schema": SCHEMA}},
    max_tokens=96,
)
work = json.loads(answer.choices[0].message.content)
print(f"{work['kind']}: {work['name']} ({work['year']})")
