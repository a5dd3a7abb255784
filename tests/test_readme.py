"""What README.md shows is run as it stands there."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.boot
@pytest.mark.timeout(300)
def test_the_python_of_the_readme_runs(root: Path, tmp_path: Path) -> None:
    [program] = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    content = b"read me" * 1024
    (tmp_path / "README").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result, wrote, read_back, _, virtio, *more = done.stdout.splitlines()
    release = re.fullmatch(r"3 b'(\d+\.\d+\.\S+)\\n' b'oops\\n'", result)
    assert release
    assert wrote == "the guest wrote 0xcafe"
    assert read_back == "and read back 0x0000CAFF"
    digest = hashlib.md5(content).hexdigest()
    assert virtio == f"through virtio: ['{len(content)}', '{digest}', '/dev/vda']"
    assert more[:2] == ["process VM: [0, 1, 2]", "process VM: [0, 1, 2, 3, 4]"]
    booted = more.index(release[1])
    asked, head, *levels, found, code, end = more[booted + 1 :]
    assert re.fullmatch(r"0x[0-9a-f]+: read, supervisor, .* paging", asked)
    assert head.startswith("level")
    assert len(levels) in range(2, 6)
    assert found.startswith("-> 0x")
    assert re.fullmatch(r"[0-9a-f]{16} 0x[0-9a-f]+", code)
    assert end == "stopped"


def test_the_two_commands_come_first(root: Path) -> None:
    text = (root / "README.md").read_text()
    first = re.findall(r"^    (\S.*?)(?:\s+#.*)?$", text, re.MULTILINE)[:2]
    assert first == ["make demo", "make test"]
