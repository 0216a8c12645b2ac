"""OpenAI's addresses as vLLM, llama.cpp and Ollama serve them; the forms are in `openai_forms`."""

from __future__ import annotations

import base64
import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from sutazai.testing.machine import VECTOR_FORMAT, Inference, Machine, Other, vector, words
from sutazai.testing.openai_forms import VLLM, Body, ChatForm, CompletionForm, Flavour, Form
from sutazai.testing.received import Received
from sutazai.testing.script import Answer
from sutazai.testing.steps import Steps, TakeSlot, document, pause


class OpenAiApi:
    """What answers below `/v1`."""

    def __init__(self, machine: Machine, flavour: Flavour) -> None:
        self._machine = machine
        self._flavour = flavour
        self._numbers = itertools.count(1)

    def inference(self) -> Mapping[str, Inference]:
        """By path; the method is POST."""
        return {
            "/v1/chat/completions": self._on_body(self._chat),
            "/v1/completions": self._on_body(self._complete),
            "/v1/embeddings": self._on_body(self._embed),
        }

    def other(self) -> Mapping[tuple[str, str], Other]:
        """By method and path."""
        return {("GET", "/v1/models"): self._list}

    def _on_body(self, handler: Callable[[Body, str, Answer], Steps]) -> Inference:
        """The handler, fed with the decoded body and the model that answers."""

        def answered(received: Received, answer: Answer) -> Steps:
            try:
                body = msgspec.json.decode(received.body, type=Body)
            except msgspec.DecodeError as error:
                return self._refuse(400, str(error))
            if not self._flavour.knows_models:
                return handler(body, self._machine.models[0], answer)
            if not self._machine.has(body.model):
                return self._refuse(404, f"The model `{body.model}` does not exist.")
            return handler(body, body.model, answer)

        return answered

    def _refuse(self, status: int, message: str) -> Steps:
        return document(status, self._flavour.error(status, message), closes=self._flavour.closes_after_error)

    def _chat(self, body: Body, model: str, answer: Answer) -> Steps:
        prompt_words = sum(message.words() for message in body.messages)
        return self._talk(ChatForm(self._flavour, body, model, next(self._numbers), answer, prompt_words))

    def _complete(self, body: Body, model: str, answer: Answer) -> Steps:
        prompts = _texts(body.prompt)
        prompt_words = sum(words(prompt) for prompt in prompts)
        number = next(self._numbers)
        return self._talk(
            CompletionForm(self._flavour, body, model, number, answer, prompt_words, prompts=len(prompts))
        )

    def _talk(self, form: Form) -> Steps:
        slot = self._slot(form.model)
        return form.streamed(slot) if form.body.stream else form.whole(slot)

    def _slot(self, model: str) -> TakeSlot:
        return TakeSlot(self._machine.wire_name(model), self._machine.default_options())

    def _embed(self, body: Body, model: str, answer: Answer) -> Steps:
        yield self._slot(model)
        yield from pause(answer.first_token_s)
        texts = _texts(body.input)
        count = sum(words(text) for text in texts)
        as_bytes = body.encoding_format == "base64"
        embeddings = [
            {"object": "embedding", "index": index, "embedding": _packed(text) if as_bytes else vector(text)}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        yield from document(200, {"object": "list", "data": embeddings, "model": model, "usage": usage})

    def _list(self, _: Received) -> Steps:
        entry = {"object": "model", "created": 1_767_323_045, "owned_by": self._flavour.owner}
        if self._flavour is VLLM:
            entry["max_model_len"] = self._machine.context_tokens
        models = [{"id": model} | entry for model in self._machine.models]
        return document(200, {"object": "list", "data": models})


def _texts(given: str | Sequence[Any]) -> list[str]:
    """A text, texts, token ids or lists of these, as texts."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [" ".join(map(str, given))]
    return [text if isinstance(text, str) else " ".join(map(str, text)) for text in given]


def _packed(text: str) -> str:
    return base64.b64encode(struct.pack(VECTOR_FORMAT, *vector(text))).decode("ascii")
