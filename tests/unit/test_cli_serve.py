"""What `sutazai gateway` says when it cannot start."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def test_a_data_folder_that_cannot_be_made_is_named_and_not_taken_for_the_port(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SUTAZAI_")}
    environ = kept | {"SUTAZAI_DATABASE_DATA_DIR": str(in_the_way / "data"), "SUTAZAI_DISCOVERY_OLLAMA": "false"}

    ended = subprocess.run(
        [sys.executable, "-m", "sutazai", "gateway"],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )

    assert ended.returncode == 1
    assert str(in_the_way) in ended.stderr
    assert "database.data_dir" in ended.stderr
    assert "listen" not in ended.stderr
