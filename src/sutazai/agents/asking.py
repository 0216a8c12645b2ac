"""Asking a model for JSON: the answer is checked, and complaints go back to it a bounded number of times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from sutazai.agents.texts import json_in, user
from sutazai.core.errors import BadRequest, SutazaiError
from sutazai.dialects.complaints import decoded
from sutazai.ports.agent import AgentContext

T = TypeVar("T")

COMPLAINT = "That answer was not accepted: {why} Answer again with the corrected JSON alone."


class NotAnswered(SutazaiError):
    """The model did not give what it was asked for, though it was told what was wrong."""


async def ask_for(
    context: AgentContext,
    messages: Sequence[Mapping[str, Any]],
    answer_type: type[T],
    *,
    model: str = "",
    retries: int = 2,
) -> T:
    """An answer of that type. Raises `NotAnswered`."""
    decoder = msgspec.json.Decoder(answer_type)
    return await ask_until(
        context,
        messages,
        lambda text: decoded(decoder, text.encode("utf-8", "replace"), under="answer"),
        schema=msgspec.json.schema(answer_type),
        model=model,
        retries=retries,
    )


async def ask_until(
    context: AgentContext,
    messages: Sequence[Mapping[str, Any]],
    check: Callable[[str], T],
    *,
    schema: Mapping[str, Any],
    model: str = "",
    retries: int = 2,
) -> T:
    """
    What `check` makes of the answer; it raises `BadRequest` for one that will not do. Raises `NotAnswered`.

    Args:
        schema: JSON schema that nodes which can hold the model to it are given.
    """
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    conversation = list(messages)
    complaint = ""
    for _ in range(retries + 1):
        said = await context.chat(conversation, model=model, response_format=wanted)
        try:
            return check(json_in(said.text))
        except BadRequest as error:
            complaint = error.message
            # only the last try goes along, so that the conversation does not grow
            conversation = [
                *messages,
                {"role": "assistant", "content": said.text},
                user(COMPLAINT.format(why=complaint)),
            ]
    raise NotAnswered(
        f"The model's answer was not accepted {retries + 1} times, last because: {complaint} "
        "Try a larger model, or a simpler schema."
    )
