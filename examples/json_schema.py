"""An answer that fits a JSON schema."""

import json
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "inhabitants": {"type": "integer"}},
    "required": ["city", "inhabitants"],
    "additionalProperties": False,
}

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:30000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
answer = client.chat.completions.create(
    model="smollm2-135m",
    messages=[{"role": "user", "content": "Name a large city in Japan and how many people live there, as JSON."}],
    response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
    temperature=0,
    max_tokens=64,
)
print(json.loads(answer.choices[0].message.content or ""))
