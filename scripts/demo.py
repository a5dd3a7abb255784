"""make demo: what works on this host, then a command in a new virtual machine, and what came of it.

demo.py [-- COMMAND ARGS...] runs another command instead of the one that shows things around.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

POLYVISOR = Path(sys.executable).with_name("polyvisor")
STATUS = 7
TOUR = f"""
echo "Hello from $(uname -srm), process $$ of user $(id -un)"
sed -n 's/^model name.*: /CPU:    /p; s/^\\(hypervisor vendor\\).*: /\\1 /p' /proc/cpuinfo
awk '/^MemTotal/ {{ print "memory: " int($2 / 1024) " MB" }}' /proc/meminfo
awk '{{ print "up:     " $1 " s" }}' /proc/uptime
echo "and this line went to standard error" >&2
exit {STATUS}
"""


def relay(stream: IO[str], mark: str) -> None:
    for line in stream:
        print(f"  {mark} {line}", end="", flush=True)


def main() -> int:
    own = sys.argv[2:] if sys.argv[1:2] == ["--"] else []
    print("$ polyvisor doctor", flush=True)
    subprocess.run([POLYVISOR, "doctor"], check=False, stdin=subprocess.DEVNULL)

    command = own or ["sh", "-c", TOUR]
    print(f"\n$ polyvisor exec -- {' '.join(own) if own else 'sh -c ...'}", flush=True)
    start = time.monotonic()
    with subprocess.Popen(
        [POLYVISOR, "exec", "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout
        assert process.stderr
        relays = [
            threading.Thread(target=relay, args=(process.stdout, "stdout |")),
            threading.Thread(target=relay, args=(process.stderr, "stderr |")),
        ]
        for thread in relays:
            thread.start()
        for thread in relays:
            thread.join()
        status = process.wait()
    seconds = time.monotonic() - start
    if own:
        return status
    if status != STATUS:
        print(f"demo: exec gave status {status}; the command ends with {STATUS}", file=sys.stderr)
        return 1
    print(
        f"\nA machine was made, Debian's kernel booted, the command ran and ended with status "
        f"{status},\nas it was written to, and the machine is gone again: {seconds:.1f} s in all."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
