"""What `rabbitmq.url` may say, that its password is never seen, and what queues are declared with."""

from __future__ import annotations

from urllib.parse import quote, unquote, urlsplit

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.adapters.rabbitmq.address import parse
from sutazai.adapters.rabbitmq.topology import declaration_of, definitions
from sutazai.core.errors import SettingsError
from sutazai.settings.model import Rabbitmq
from sutazai.settings.secret import Secret


def test_a_node_alone_has_defaults_for_all_but_its_host() -> None:
    """The shortest address."""
    address = parse(Secret("amqp://broker"))

    (node,) = address.nodes
    assert (node.name, address.vhost) == ("broker:5672", "/")
    assert node.url.reveal() == "amqp://guest:guest@broker:5672/%2F?heartbeat=10"


def test_a_cluster_is_some_of_its_nodes_with_one_name_and_password() -> None:
    """The longest address."""
    address = parse(Secret("amqps://me:p%40ss@a:1,[::1],c:3/tasks"), heartbeat_s=60)

    assert str(address) == "a:1,[::1]:5671,c:3"
    assert address.vhost == "tasks"
    assert address.nodes[1].url.reveal() == "amqps://me:p%40ss@[::1]:5671/tasks?heartbeat=60"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://:hunter2@host",
        "amqp://me:hunter2@",
        "amqp://me:hunter2@host:0",
        "amqp://me:hunter2@host:65536",
        "amqp://me:hunter2@host:port",
        "amqp://me:hunter2@a,,b",
        "amqp://me:hunter2@host/a/b",
        "amqp://me:hunter2@host?password=hunter2",
        "amqp://me:hunter2@x@host",
    ],
)
def test_an_address_that_is_not_understood_is_refused_without_its_password(url: str) -> None:
    """The error tells what to write."""
    with pytest.raises(SettingsError) as caught:
        parse(Secret(url))

    assert "amqp://user:password@host:5672" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@given(password=st.text(min_size=6).filter(lambda text: text.encode("utf-8", "ignore").decode() == text))
def test_any_password_can_be_written_and_is_not_shown(password: str) -> None:
    """Percent signs stand for what has a meaning in an address."""
    address = parse(Secret(f"amqp://me:{quote(password, safe='')}@host"))

    assert unquote(urlsplit(address.nodes[0].url.reveal()).password or "") == password
    assert password not in str(address) or password in "host:5672"


def test_a_queue_of_tasks_is_declared_with_the_promises_of_the_settings() -> None:
    """Each of them is a setting."""
    settings = Rabbitmq(prefix="acme", max_length=7, delivery_limit=3, replicas=5)

    declaration = declaration_of("task_processing", settings)

    assert declaration.name == "acme.task_processing"
    assert declaration.arguments == {
        "x-queue-type": "quorum",
        "x-quorum-initial-group-size": 5,
        "x-max-length": 7,
        "x-overflow": "reject-publish",
        "x-delivery-limit": 3,
        "x-dead-letter-exchange": "acme.dead_letters",
        "x-dead-letter-routing-key": "acme.dead_letters",
        "x-dead-letter-strategy": "at-least-once",
    }
    assert declaration_of("embeddings", settings).arguments == declaration.arguments


def test_dead_letters_go_nowhere_from_their_queue() -> None:
    """Or they would go in circles."""
    declaration = declaration_of("dead_letters", Rabbitmq())

    assert not declaration.has_dead_letters
    assert "x-delivery-limit" not in declaration.arguments


def test_the_stream_forgets_after_days() -> None:
    """Seven of them, unless the settings say otherwise."""
    assert declaration_of("agent_coordination", Rabbitmq()).arguments["x-max-age"] == "7D"
    assert declaration_of("agent_coordination", Rabbitmq(stream_days=1)).arguments["x-max-age"] == "1D"


def test_the_definitions_hold_every_queue_and_no_secret() -> None:
    """They are for a file that anybody may read."""
    text = definitions(Rabbitmq(url=Secret("amqp://me:hunter2@host/tasks")))

    whole = msgspec.json.decode(text)
    assert {queue["name"] for queue in whole["queues"]} == {
        "task_processing",
        "llm_inference",
        "dead_letters",
        "agent_coordination",
    }
    assert {queue["vhost"] for queue in whole["queues"]} == {"tasks"}
    assert [binding["destination"] for binding in whole["bindings"]] == ["dead_letters"]
    assert b"hunter2" not in text
