"""
Tune the weights of `sutazai.policy.request_type` on `data/request_types`, and say how well they do.

    python scripts/tune_request_type.py            # writes the weights and prints the confusion matrix
    python scripts/tune_request_type.py --check    # prints the matrix of the weights that are there

Multinomial logistic regression with a little L2, by plain gradient descent: a few hundred prompts need no library.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sutazai.core.request import Question
from sutazai.policy.request_type import TYPES, RequestType, features, looked_at, score, softmax
from sutazai.testing.prompts import Labelled, confusion, labelled_prompts, matrix_lines

_ROOT = Path(__file__).resolve().parent.parent
_WEIGHTS = _ROOT / "src" / "sutazai" / "policy" / "request_type_weights.py"
_ROUNDS = 1500
_STEP = 2.0
_L2 = 0.0005
_BY_HAND = {"tools": (-0.5, 0.6, 0.2), "images": (0.0, 0.4, -0.4), "long conversation": (-0.3, 0.4, 0.0)}
"""Facts that the labelled prompts do not have; a model that can do more is the safer choice."""


def main() -> None:
    """Tune, unless only asked to check."""
    prompts = labelled_prompts(_ROOT / "data" / "request_types")
    if "--check" not in sys.argv[1:]:
        weights = _tuned([one for one in prompts if not one.is_for_test])
        _WEIGHTS.write_text(_module(weights), "utf-8")
        print("Wrote the weights. Run again with --check to see what they do.")
        return
    for name, chosen in (("train", False), ("test", True)):
        print(f"\n{name}")
        print("\n".join(matrix_lines(confusion([one for one in prompts if one.is_for_test is chosen]))))


def _tuned(prompts: Sequence[Labelled]) -> dict[str, list[float]]:
    seen = [(_features(one.text), TYPES.index(one.kind)) for one in prompts]
    weights = {name: [0.0] * len(TYPES) for found, _ in seen for name in found}
    for _ in range(_ROUNDS):
        gradient = {name: [_L2 * value for value in values] for name, values in weights.items()}
        for found, right in seen:
            for index, share in enumerate(softmax(score(found, weights))):
                wrong = (share - float(index == right)) / len(seen)
                for name, value in found.items():
                    gradient[name][index] += wrong * value
        for name, values in gradient.items():
            weights[name] = [old - _STEP * slope for old, slope in zip(weights[name], values, strict=True)]
    return weights | {name: list(values) for name, values in _BY_HAND.items()}


def _features(text: str) -> dict[str, float]:
    shown = looked_at(text)
    return features(Question(text=text), shown, shown.lower())


def _module(weights: dict[str, list[float]]) -> str:
    order = ", ".join(kind.value for kind in RequestType)
    lines = [
        f"    {name!r}: ({', '.join(f'{value:.3f}' for value in weights[name])}),".replace("'", '"') for name in weights
    ]
    return (
        f'"""Weights of {order}, made by `scripts/tune_request_type.py`."""\n\n'
        "from __future__ import annotations\n\n"
        "from collections.abc import Mapping\nfrom typing import Final\n\n"
        "WEIGHTS: Final[Mapping[str, tuple[float, ...]]] = {\n" + "\n".join(lines) + "\n}\n"
    )


if __name__ == "__main__":
    main()
