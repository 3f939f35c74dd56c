"""Let the model call a Python function, with the `openai` client: python examples/tools.py [URL]."""

import json
import sys

from openai import OpenAI

WEATHER = {
    "name": "get_weather",
    "description": "Current weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


def get_weather(city: str, unit: str) -> str:
    """What a real function would look up."""
    return f"It is 21 degrees {unit} and sunny in {city}."


url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
how = {"model": client.models.list().data[0].id, "tools": [{"type": "function", "function": WEATHER}], "max_tokens": 96}
turns = [{"role": "user", "content": "What is the weather in Paris?"}]
# "required": a call, and its arguments are valid. "auto" leaves it to the model whether to call.
# One call only: a small model may call again and again, until max_tokens cuts the last call off.
first = client.chat.completions.create(messages=turns, tool_choice="required", parallel_tool_calls=False, **how)
turns += [first.choices[0].message]
for call in turns[-1].tool_calls:
    result = get_weather(**json.loads(call.function.arguments))
    print(f"{call.function.name}({call.function.arguments}) -> {result}")
    turns.append({"role": "tool", "tool_call_id": call.id, "content": result})
print(client.chat.completions.create(messages=turns, tool_choice="none", **how).choices[0].message.content)
