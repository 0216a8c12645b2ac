"""What is wrong with the addresses and secrets of servers that we use: Redis, RabbitMQ, a bucket, webhooks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sutazai.policy.web_addresses import Guard
from sutazai.settings import model
from sutazai.settings.places import Spot
from sutazai.settings.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Iterator

MIN_SECRET_CHARACTERS = 16

Mistake = tuple[Spot, str]
"""Where inside the group, and `was ...; give ...`."""


def mistakes_in_service(group: model.Group) -> Iterator[Mistake]:
    """All that is wrong with one of these groups, beside ranges."""
    match group:
        case model.Redis():
            yield from _redis(group)
        case model.Rabbitmq():
            yield from _rabbitmq(group)
        case model.Objects():
            yield from _objects(group)
        case model.Web():
            yield from _web(group)
        case model.Webhooks(secret=Secret() as secret):
            yield from _webhook_secret(secret)


def _redis(redis: model.Redis) -> Iterator[Mistake]:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", redis.prefix):
        yield ("prefix",), "was not 1 to 64 letters, digits and . _ -; give a plain word"
    if redis.url is None:
        return
    if (wrong := unusable(redis.url)) is not None:
        yield ("url",), wrong
    elif not re.match(r"rediss?(://[^/]|\+cluster://[^/]|\+sentinel://[^/]+/[^/?])", redis.url.reveal()):
        yield ("url",), "was no Redis address; give one such as redis://:password@host:6379/0 (its value is hidden)"


def _rabbitmq(rabbitmq: model.Rabbitmq) -> Iterator[Mistake]:
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,64}", rabbitmq.prefix):
        yield ("prefix",), "was not at most 64 letters, digits and . _ -; give a plain word, or nothing"
    management = rabbitmq.management_url
    if management is not None and (wrong := unusable(management)) is not None:
        yield ("management_url",), wrong
    elif management is not None and not re.match(r"https?://[^/]", management.reveal()):
        yield ("management_url",), "was no address; give one such as http://host:15672 (its value is hidden)"
    if rabbitmq.url is None:
        return
    if (wrong := unusable(rabbitmq.url)) is not None:
        yield ("url",), wrong
    elif not re.match(r"amqps?://[^/]", rabbitmq.url.reveal()):
        yield ("url",), "was no RabbitMQ address; give one such as amqp://user:password@host:5672 (its value is hidden)"


def _objects(objects: model.Objects) -> Iterator[Mistake]:
    scheme, separator, rest = objects.url.partition("://")
    if separator and scheme != "s3":
        yield ("url",), "was neither a folder nor a bucket; give a path, or `s3://bucket/prefix`"
    elif separator and not rest.partition("/")[0]:
        yield ("url",), "had no bucket; give `s3://bucket/prefix`"
    if objects.endpoint and not objects.endpoint.startswith(("http://", "https://")):
        yield ("endpoint",), "was no address; give one such as `http://minio:9000`"
    for name in ("access_key_id", "secret_access_key"):
        secret = getattr(objects, name)
        if secret is not None and (wrong := unusable(secret)) is not None:
            yield (name,), wrong


def unusable(secret: Secret) -> str | None:
    """What keeps a secret from being used as it stands; None where nothing does."""
    text = secret.reveal()
    if text == Secret.HIDDEN:
        return f"was {Secret.HIDDEN}, which stands for what `config show` hides; give the value itself"
    if not re.fullmatch(r"[!-~]+", text):
        return "was not all ASCII without spaces, or empty; correct it (its value is hidden)"
    return None


def _web(web: model.Web) -> Iterator[Mistake]:
    for index, one in enumerate(web.allowed):
        try:
            Guard((one,))
        except ValueError:
            yield ("allowed", index), "was no name, address or network; give one such as hooks.example or 10.1.0.0/16"


def _webhook_secret(secret: Secret) -> Iterator[Mistake]:
    if (wrong := unusable(secret)) is not None:
        yield ("secret",), wrong
    elif len(secret.reveal()) < MIN_SECRET_CHARACTERS:
        yield (
            ("secret",),
            f"was shorter than {MIN_SECRET_CHARACTERS} characters; give what `openssl rand -hex 32` prints",
        )
