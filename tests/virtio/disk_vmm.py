"""A process that runs `disk_load write` on a disk until somebody kills it: what the guest says goes
to stdout. Arguments: the program, the image, JSON with arguments of `add_disk`, and the program's
own after the disk's name."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import polyvisor


def main() -> None:
    program, image, options, *arguments = sys.argv[1:]
    polyvisor.exec(
        ["/disk_load", "write", "/dev/vda", *arguments],
        files={"/disk_load": Path(program).read_bytes()},
        memory="128M",
        engine="soft",
        on_machine=lambda machine: machine.add_disk(image, **json.loads(options)),
        on_stdout=lambda data: os.write(1, data) and None,
        check=True,
    )


if __name__ == "__main__":
    main()
