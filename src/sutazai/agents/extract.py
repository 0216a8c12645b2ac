"""Data out of text, in the form of a JSON schema; the answer is checked against it before anybody gets it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from sutazai.agents.asking import ask_until
from sutazai.agents.registry import agent
from sutazai.agents.schemas import MAX_SCHEMA_BYTES, check_schema, mistakes
from sutazai.agents.texts import ModelName, Prompt, system, user
from sutazai.core.errors import BadRequest
from sutazai.ports.agent import AgentContext

TASK = (
    "Extract the data that this JSON schema describes from the user's text. Answer with one JSON value that fits the "
    "schema and nothing else. Invent nothing: leave out, or set to null where the schema allows, what the text does "
    "not say.\n\n{schema}"
)
MOST_MISTAKES_TOLD = 5


class Source(Struct, forbid_unknown_fields=True):
    """Where to look, and for what."""

    text: Prompt
    schema: dict[str, Any]
    """JSON schema of the data: an object; `$ref` is not understood."""
    instructions: Annotated[str, Meta(max_length=4000)] = ""
    retries: Annotated[int, Meta(ge=0, le=5)] = 2
    """How often the model is told what was wrong with its answer."""
    model: ModelName = ""


class Extracted(Struct):
    """What was found."""

    data: Any


@agent()
async def extract(context: AgentContext, source: Source) -> Extracted:
    """Extracts data from a text by a JSON schema."""
    written = msgspec.json.encode(source.schema)
    if len(written) > MAX_SCHEMA_BYTES:
        raise BadRequest(f"schema was larger than {MAX_SCHEMA_BYTES} bytes.", where="schema")
    check_schema(source.schema)

    def checked(answer: str) -> Any:
        try:
            data = msgspec.json.decode(answer.encode("utf-8", "replace"))
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRequest(f"It was not JSON: {error}.") from error
        if found := mistakes(data, source.schema):
            raise BadRequest(" ".join(found[:MOST_MISTAKES_TOLD]))
        return data

    task = TASK.format(schema=written.decode())
    if source.instructions:
        task += f"\n\n{source.instructions}"
    messages = [system(task), user(source.text)]
    data = await ask_until(context, messages, checked, schema=source.schema, model=source.model, retries=source.retries)
    return Extracted(data)
