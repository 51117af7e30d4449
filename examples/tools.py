"""Define functions that a model may call, and make the model call one.

python examples/tools.py

In a conversation the model decides whether to call one, and nanollama asks you before each call:
nanollama --model MODEL --interactive --tools examples/tools.py
"""

import json

from nanollama import LLM, GenerationRequest, SamplingParams, ToolChoice, function_tool


def population(city: str) -> int:
    """Return the number of people who live in a city.

    Args:
        city: its name, in English
    """
    return {"Bern": 137_000, "Vienna": 2_030_000, "Berlin": 3_880_000}[city]


def add(numbers: list[float]) -> float:
    """Add numbers."""
    return sum(numbers)


if __name__ == "__main__":
    llm = LLM("smollm2")
    request = GenerationRequest(
        messages=[{"role": "user", "content": "How many people live in Vienna?"}],
        params=SamplingParams(temperature=0, repeat_penalty=1),
        tools=[function_tool(population), function_tool(add)],
        tool_choice=ToolChoice("required", max_calls=1),
    )
    prepared = llm.prepare(request)
    splitter = prepared.splitter()
    pieces = splitter.push(llm.complete(prepared).text) + splitter.flush()
    name = next(text for kind, text in pieces if kind == "name")
    arguments = "".join(text for kind, text in pieces if kind == "arguments")
    result = {"population": population, "add": add}[name](**json.loads(arguments))
    print(f"{name} {arguments} -> {result}")
