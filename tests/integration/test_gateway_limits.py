"""Limits through the whole gateway: what each dialect's client is told, and that nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from sutazai.settings.model import Cache, LimitSettings, ModelSettings, Redis
from sutazai.testing import Answer, Fault

if TYPE_CHECKING:
    from tests.conftest import Answered, Dial, StartGateway, StartNode, Wire

CHAT = {"model": "llama3", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}
PATHS = {"openai": "/v1/chat/completions", "ollama": "/api/chat"}
NO_CACHE = Cache(enabled=False)


async def ask(wire: Wire, path: str = PATHS["openai"], **fields: object) -> Answered:
    wire.post(path, CHAT | fields)
    return await wire.answer()


async def until_free(wire: Wire) -> Answered:
    """Ask until nothing that ran before holds a place."""
    async with asyncio.timeout(5):
        while (answer := await ask(wire)).status == 429:
            await asyncio.sleep(0.01)
    return answer


async def test_who_asks_too_much_is_told_so_in_openais_form(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    gateway = await gateways(await fake_nodes(), limits=LimitSettings(requests_per_minute=2), cache=NO_CACHE)
    wire = await dial(gateway.port)

    answers = [await ask(wire) for _ in range(3)]

    assert [answer.status for answer in answers] == [200, 200, 429]
    error = answers[2].json["error"]
    assert error["type"] == "rate_limit_error"
    assert error["message"].startswith("The tenant 'local' may take 2 requests a minute and took them; come back in ")
    assert 25 <= int(answers[2].headers["retry-after"]) <= 30


async def test_who_asks_too_much_is_told_so_in_ollamas_form(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    gateway = await gateways(await fake_nodes(), limits=LimitSettings(requests_per_minute=1), cache=NO_CACHE)
    wire = await dial(gateway.port)
    await ask(wire, PATHS["ollama"], stream=False)

    refused = await ask(wire, PATHS["ollama"], stream=False)

    assert refused.status == 429
    assert "may take 1 requests a minute" in refused.json["error"]
    assert "retry-after" in refused.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_tells_what_is_left(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, stream: bool
) -> None:
    limits = LimitSettings(requests_per_minute=60, tokens_per_minute=6000)
    gateway = await gateways(await fake_nodes(), limits=limits, cache=NO_CACHE)
    wire = await dial(gateway.port)

    headers = (await ask(wire, stream=stream)).headers

    told = {name.removeprefix("x-ratelimit-"): value for name, value in headers.items() if "ratelimit" in name}
    assert {name: told[name] for name in ("limit-requests", "remaining-requests", "reset-requests")} == {
        "limit-requests": "60",
        "remaining-requests": "59",
        "reset-requests": "1s",
    }
    assert told["limit-tokens"] == "6000"
    assert 5850 <= int(told["remaining-tokens"]) < 6000 - 50
    assert told["reset-tokens"] in {"1s", "2s"}


async def test_tokens_are_counted_as_the_node_told_them(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """Far more was set aside while it ran."""
    node = await fake_nodes()
    gateway = await gateways(node, limits=LimitSettings(tokens_per_minute=3000), cache=NO_CACHE)
    wire = await dial(gateway.port)
    first = await ask(wire, max_tokens=2500)
    usage = first.json["usage"]

    second = await ask(wire, max_tokens=2500)

    assert [first.status, second.status] == [200, 200]
    difference = int(first.headers["x-ratelimit-remaining-tokens"]) - int(
        second.headers["x-ratelimit-remaining-tokens"]
    )
    assert difference <= usage["total_tokens"]


@pytest.mark.parametrize("end", ["answered", "client left", "node broke off"])
async def test_a_place_is_given_back_however_a_request_ends(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, end: str
) -> None:
    node = await fake_nodes()
    gateway = await gateways(node, limits=LimitSettings(concurrent_requests=1), cache=NO_CACHE)
    wire, other = await dial(gateway.port), await dial(gateway.port)
    node.script.append(Fault.reset_before_head() if end == "node broke off" else Answer(first_token_s=0.3))
    wire.post(PATHS["openai"], CHAT)
    if end != "node broke off":
        async with asyncio.timeout(5):
            while not node.active:
                await asyncio.sleep(0.01)
        assert (await ask(other)).status == 429

    if end == "client left":
        wire.writer.close()
    else:
        await wire.answer()

    assert (await until_free(other)).status == 200


async def test_a_months_money_is_spent_by_the_models_price(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    """Nothing passes that might cost more than is left."""
    prices = {"dear": ModelSettings(price_input=1e6, price_output=1e6)}  # of a model that no other test asks
    gateway = await gateways(
        await fake_nodes(models=("dear",)), limits=LimitSettings(money_per_month=200.0), models=prices, cache=NO_CACHE
    )
    wire = await dial(gateway.port)

    answers = [await ask(wire, model="dear", max_tokens=tokens) for tokens in (50, 500)]

    assert [answer.status for answer in answers] == [200, 429]
    assert answers[1].json["error"]["type"] == "insufficient_quota"
    assert "a new month (UTC) begins in" in answers[1].json["error"]["message"]


async def test_an_answer_from_the_cache_costs_a_request_and_no_tokens(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial
) -> None:
    node = await fake_nodes()
    gateway = await gateways(node, limits=LimitSettings(requests_per_minute=600, tokens_per_minute=1000))
    wire = await dial(gateway.port)

    answers = [await ask(wire, temperature=0, max_tokens=400) for _ in range(8)]

    assert [answer.status for answer in answers] == [200] * 8
    assert len(node.inferences) == 1
    left = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers]
    assert left[-1] >= left[1]  # what is set aside is given back each time
    assert int(answers[-1].headers["x-ratelimit-remaining-requests"]) < int(
        answers[0].headers["x-ratelimit-remaining-requests"]
    )


async def test_two_gateways_on_one_redis_share_a_limit(
    gateways: StartGateway, fake_nodes: StartNode, dial: Dial, any_redis: Redis
) -> None:
    node = await fake_nodes()
    limits = LimitSettings(requests_per_minute=5)
    pair = [await gateways(node, limits=limits, redis=any_redis, cache=NO_CACHE) for _ in range(2)]
    wires = [await dial(gateway.port) for gateway in pair]

    statuses = [(await ask(wire)).status for _ in range(4) for wire in wires]

    assert statuses == [200] * 5 + [429] * 3
