"""Addresses of several servers."""

from __future__ import annotations

import pytest

from sutazai.adapters.postgres.addresses import one_by_one
from sutazai.settings.secret import Secret


@pytest.mark.parametrize(
    ("urls", "each"),
    [
        (["postgresql://a/name"], ["postgresql://a/name"]),
        (
            ["postgresql://me:p,w@a:1,b,[::1]:2/name?sslmode=require"],
            [
                "postgresql://me:p,w@a:1/name?sslmode=require",
                "postgresql://me:p,w@b/name?sslmode=require",
                "postgresql://me:p,w@[::1]:2/name?sslmode=require",
            ],
        ),
        (["postgresql://a,b", "postgresql://b,c"], ["postgresql://a", "postgresql://b", "postgresql://c"]),
        (["postgresql://me@/name?host=/run/a@b,c&port=5432"], ["postgresql://me@/name?host=/run/a@b,c&port=5432"]),
        (["nonsense, as it is"], ["nonsense, as it is"]),
        ([""], [""]),
    ],
)
def test_each_server_stands_once_and_in_order(urls: list[str], each: list[str]) -> None:
    assert [url.reveal() for url in one_by_one(map(Secret, urls))] == each
