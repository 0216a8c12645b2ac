"""One answer to a conversation: the plainest agent, for long answers that nobody waits for on a connection."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from sutazai.agents.registry import agent
from sutazai.agents.texts import MAX_PROMPT_CHARACTERS, ModelName
from sutazai.ports.agent import AgentContext


class Message(Struct, forbid_unknown_fields=True):
    """What one side said."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Meta(max_length=MAX_PROMPT_CHARACTERS)]


class Conversation(Struct, forbid_unknown_fields=True):
    """What was said so far."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=1000)]
    model: ModelName = ""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class Answer(Struct):
    """What the model said."""

    text: str
    model: str
    input_tokens: int
    output_tokens: int


@agent()
async def chat(context: AgentContext, conversation: Conversation) -> Answer:
    """Answers a conversation."""
    options = {"temperature": conversation.temperature, "max_tokens": conversation.max_tokens}
    said = await context.chat(
        [{"role": message.role, "content": message.content} for message in conversation.messages],
        model=conversation.model,
        **{name: value for name, value in options.items() if value is not None},
    )
    return Answer(said.text, said.model, said.input_tokens, said.output_tokens)
