"""How limits are told to clients: the header lines of every limited answer, and refusals."""

from __future__ import annotations

import math
from functools import lru_cache

from sutazai.core.errors import BudgetSpent, RateLimited
from sutazai.policy.rate_limit import BUDGETS, SLACK, Kind, Standing, Verdict

REQUESTS_LINES = (
    b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\nx-ratelimit-reset-requests: %b\r\n"
)
TOKENS_LINES = b"x-ratelimit-limit-tokens: %d\r\nx-ratelimit-remaining-tokens: %d\r\nx-ratelimit-reset-tokens: %b\r\n"
UNITS = {
    Kind.REQUESTS: "requests a minute",
    Kind.TOKENS: "tokens a minute",
    Kind.BYTES: "bytes of requests a minute",
    Kind.CONCURRENT: "requests at once",
    Kind.MONTH_TOKENS: "tokens a month",
    Kind.MONTH_MONEY: "a month",
}


def header_lines(verdict: Verdict) -> bytes:
    """OpenAI's headers, of the tightest limit of each kind; empty where neither requests nor tokens are limited."""
    bounds = verdict.bounds
    lines = _lines(REQUESTS_LINES, verdict, bounds.requests) if bounds.requests else b""
    return lines + _lines(TOKENS_LINES, verdict, bounds.tokens) if bounds.tokens else lines


def refusal(verdict: Verdict) -> RateLimited:
    """What to say to a request that had no room, of the limit that it must wait for longest."""
    standing = max(verdict.standings(), key=lambda standing: standing.retry_after_s)
    kind = BudgetSpent if standing.bound.kind in BUDGETS else RateLimited
    return kind(_message(verdict, standing), retry_after_s=standing.retry_after_s, extra=header_lines(verdict))


@lru_cache(maxsize=4096)
def in_words(seconds: int) -> str:
    """A time in the form of the reset headers: `1s`, `6m0s`, `2h0m5s`."""
    minutes, left_s = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{left_s}s"
    return f"{minutes}m{left_s}s" if minutes else f"{left_s}s"


@lru_cache(maxsize=4096)
def _reset(seconds: int) -> bytes:
    return in_words(seconds).encode()


def _lines(form: bytes, verdict: Verdict, places: tuple[int, ...]) -> bytes:
    bounds = verdict.bounds.all
    place = places[0]
    if len(places) > 1:
        place = min(places, key=lambda place: bounds[place].capacity - verdict.level(place))
    bound = bounds[place]
    level = verdict.levels[place]  # what `Verdict.level` says, written out: this is for every answer
    if verdict.admitted:
        level += verdict.amounts[bound.kind]
    remaining = int(bound.capacity - level + SLACK)
    reset_s = int(level / bound.per_s + 0.999999) if bound.per_s else 60
    return form % (bound.limit, remaining if remaining > 0 else 0, _reset(reset_s))  # noqa: FURB136


def _message(verdict: Verdict, standing: Standing) -> str:
    bound = standing.bound
    allowance = verdict.bounds.allowance
    owner = f"key {allowance.key_id!r}" if bound.is_of_key else f"tenant {allowance.tenant!r}"
    asked = verdict.amounts[bound.kind]
    limit = f"The {owner} may take {bound.limit:.12g} {UNITS[bound.kind]}"
    when = f"come back in {in_words(math.ceil(standing.retry_after_s))}"
    if bound.kind is Kind.CONCURRENT:
        return f"The {owner} may have {bound.limit:g} {UNITS[bound.kind]} and had them; come back when one has ended."
    if bound.kind is Kind.REQUESTS:
        return f"{limit} and took them; {when}."
    if bound.kind in BUDGETS:
        when = f"a new month (UTC) begins in {in_words(math.ceil(standing.retry_after_s))}"
        left = f"has {standing.remaining:.12g} left, and this one might take {asked:.6g}"
        return f"{limit} and {left if standing.remaining > 0 else 'took them'}; {when}."
    return f"{limit}. It has {int(standing.remaining)} left now, and this one might take {asked:.12g}; {when}."
