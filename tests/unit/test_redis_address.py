"""What `redis.url` may say, and that its password is never seen."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sutazai.adapters.redis.address import Arranged, parse
from sutazai.core.errors import SettingsError
from sutazai.settings.secret import Secret


def test_a_server_alone_has_defaults_for_all_but_its_host() -> None:
    """The shortest address."""
    address = parse(Secret("redis://cache"))

    assert address.arranged is Arranged.ALONE
    assert (address.hosts, address.db, address.is_tls) == ((("cache", 6379),), 0, False)
    assert (address.username, address.password) == (None, None)


def test_a_server_alone_may_have_a_name_a_password_a_database_and_tls() -> None:
    """The longest address."""
    address = parse(Secret("rediss://gateway:p%40ss@[::1]:7000/3"))

    assert (address.hosts, address.db, address.is_tls) == ((("::1", 7000),), 3, True)
    assert (address.username, address.password) == ("gateway", Secret("p@ss"))


def test_sentinels_come_with_the_name_of_their_master() -> None:
    """The master's name is the path, the database a question."""
    address = parse(Secret("redis+sentinel://:pw@a:1,b,c:3/main?db=2"))

    assert address.arranged is Arranged.SENTINEL
    assert (address.hosts, address.master, address.db) == ((("a", 1), ("b", 26379), ("c", 3)), "main", 2)


def test_a_cluster_is_some_of_its_servers() -> None:
    """With TLS."""
    address = parse(Secret("rediss+cluster://:pw@a:1,b:2"))

    assert address.arranged is Arranged.CLUSTER
    assert (address.hosts, address.is_tls, str(address)) == ((("a", 1), ("b", 2)), True, "a:1,b:2")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://:hunter2@host",
        "redis://:hunter2@",
        "redis://:hunter2@host:0",
        "redis://:hunter2@host:65536",
        "redis://:hunter2@host:port",
        "redis://:hunter2@a,b",
        "redis://:hunter2@host/main",
        "redis://:hunter2@host?password=hunter2",
        "redis+sentinel://:hunter2@host:26379",
        "redis+cluster://:hunter2@host/1",
        "redis+cluster://:hunter2@host?db=1",
        "redis+other://:hunter2@host",
    ],
)
def test_an_address_that_is_not_understood_is_refused_without_its_password(url: str) -> None:
    """The error tells what to write."""
    with pytest.raises(SettingsError) as caught:
        parse(Secret(url))

    assert "redis://:password@host:6379/0" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@given(password=st.text(min_size=4).filter(lambda text: text.encode("utf-8", "ignore").decode() == text))
def test_any_password_can_be_written_and_is_not_shown(password: str) -> None:
    """Percent signs stand for what has a meaning in an address."""
    address = parse(Secret(f"redis://:{quote(password, safe='')}@host"))

    assert address.password == Secret(password)
    assert password in {"host", "6379", "host:6379"} or password not in str(address)
    assert f"password=Secret('{Secret.HIDDEN}')" in repr(address)
