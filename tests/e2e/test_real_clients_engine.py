"""OpenAI's and Ollama's own Python clients, against the embedded engine with the trial model."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import ollama
import openai
import pytest

from sutazai.settings.model import Engine

if TYPE_CHECKING:
    from tests.conftest import StartGateway

    from sutazai.bootstrap import Gateway

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None and "CI" not in os.environ,
        reason="the wheel xllamacpp is not installed",
    ),
    pytest.mark.deadline(120),
]
MODEL = "sutazai-trial"
WAITS_S = 30.0
TOKENS = 8


@pytest.fixture
async def gateway(gateways: StartGateway) -> Gateway:
    """As `sutazai up` runs it where there is nothing else."""
    return await gateways(with_engine=True, engine=Engine(enabled="always", slots=2, context_tokens=1024, threads=1))


async def test_openais_client_talks_with_the_trial_model(gateway: Gateway) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key="none", max_retries=0, timeout=WAITS_S
    ) as client:
        models = [model.id async for model in client.models.list()]
        whole = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=TOKENS, seed=1, temperature=0
        )
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=TOKENS,
            seed=1,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]

    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert models == [MODEL]
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= TOKENS
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage or chunks[-1].usage is not None


async def test_ollamas_client_talks_with_the_trial_model(gateway: Gateway) -> None:
    async with ollama.AsyncClient(f"http://127.0.0.1:{gateway.port}", timeout=WAITS_S) as client:
        listed = [model.model for model in (await client.list()).models]
        running = [model.model for model in (await client.ps()).models]
        shown = await client.show(MODEL)
        options = {"num_predict": TOKENS, "seed": 1, "temperature": 0}
        whole = await client.chat(MODEL, [{"role": "user", "content": "Hello"}], options=options)
        parts = [
            part
            async for part in await client.chat(
                MODEL, [{"role": "user", "content": "Hello"}], options=options, stream=True
            )
        ]

    assert listed == running == [MODEL]
    assert shown.details is not None
    assert whole.message.content
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert 0 < (parts[-1].eval_count or 0) <= TOKENS
