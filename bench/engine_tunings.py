"""
What slots, threads and batch are worth on the embedded engine: `python -m bench.engine_tunings`.

The samples are those of `sutazai nodes tune`, over a model of 51 million random weights. The clock is the CPU time of
the engine, so that neighbours on the machine do not show; what two threads gain in time does not show either.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from statistics import median

from sutazai.adapters.llamacpp.machine import this_machine
from sutazai.adapters.llamacpp.spec import discover_models
from sutazai.bootstrap.tuning import engine_target
from sutazai.cli.checks import available_bytes
from sutazai.gateway.tuning import tune
from sutazai.policy.tuning import Grid, Tuning
from sutazai.settings.model import Engine, Settings
from sutazai.testing.tiny_gguf import write_random

TUNINGS = (
    *(Tuning(slots, 1, 2048) for slots in (1, 2, 4, 8, 16)),
    *(Tuning(4, 1, batch_tokens) for batch_tokens in (512, 128)),
    Tuning(4, 2, 2048),
)
BUDGET_S = 600.0


def cpu_s() -> float:
    """Of all processes that this one has started and that still run."""
    total = 0.0
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


async def main() -> None:
    """Measure each tuning by itself, and print a row of a table for it."""

    async def nobody() -> None:
        """Nobody needs the engine."""

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "random.gguf"
        write_random(model, "random", layers=8, embd=768, heads=12, kv_heads=4, ffn=2048)
        settings = Settings(engine=Engine(models=(str(model),)))
        [spec] = discover_models(settings.engine)
        target = engine_target(spec, settings, this_machine(), free_bytes=available_bytes, check=nobody)
        print("| slots | threads | batch | tokens of answers | tokens of prompts |\n|---|---|---|---|---|")
        for tuning in TUNINGS:
            grid = Grid(*((value,) for value in tuning))
            outcome = await tune(target.subject, grid, tuning, budget_s=BUDGET_S, clock=cpu_s, note=lambda _: None)
            answers = median(sample.generated_per_s for sample in outcome.samples)
            prompts = median(sample.prompt_per_s for sample in outcome.samples)
            print("|", *(f"{value} |" for value in tuning), f"{answers:.0f} | {prompts:.0f} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
