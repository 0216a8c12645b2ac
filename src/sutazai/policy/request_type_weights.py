"""Weights of simple_queries, complex_analysis, code_generation, made by `scripts/tune_request_type.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

WEIGHTS: Final[Mapping[str, tuple[float, ...]]] = {
    "always": (-0.916, 1.299, -0.383),
    "asks for a fact": (2.714, -0.809, -1.905),
    "short": (1.878, -1.620, -0.257),
    "a word of reasoning": (-1.189, 1.150, 0.039),
    "words of reasoning": (-1.140, 2.601, -1.460),
    "asks how": (0.261, -1.413, 1.152),
    "very short": (2.828, -2.663, -0.165),
    "a programming word": (-0.539, -0.106, 0.645),
    "programming words": (-1.913, -1.521, 3.434),
    "greeting": (1.260, -0.738, -0.522),
    "words of making": (0.324, -1.506, 1.183),
    "several sentences": (0.353, -0.004, -0.349),
    "identifiers": (0.054, -1.644, 1.591),
    "tells of itself": (-0.028, 0.496, -0.468),
    "makes a program": (-0.063, -0.187, 0.250),
    "words of analysis": (-1.764, 4.152, -2.387),
    "asks why": (1.411, -1.002, -0.408),
    "long": (-0.422, 0.875, -0.453),
    "code symbols": (-1.245, -0.223, 1.468),
    "code block": (-0.011, -0.749, 0.760),
    "error messages": (-0.048, -0.150, 0.198),
    "tools": (-0.500, 0.600, 0.200),
    "images": (0.000, 0.400, -0.400),
    "long conversation": (-0.300, 0.400, 0.000),
}
