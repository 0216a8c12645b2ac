"""Names that a mistaken name may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """The known names most like `name`, best first; those it is a part of come before the merely similar."""
    names = sorted(set(known))
    wanted = name[:200].lower()
    parts = [known_name for known_name in names if wanted and (known_name.lower().startswith(wanted))]
    similar = get_close_matches(wanted, [known_name.lower() for known_name in names], n=limit, cutoff=0.5)
    by_lower = {known_name.lower(): known_name for known_name in names}
    return list(dict.fromkeys([*parts, *(by_lower[key] for key in similar)]))[:limit]
