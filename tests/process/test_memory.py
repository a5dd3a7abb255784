"""Memory calls of programs: what they answer, and what is in the memory then, as on the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from polyvisor import Process

SOURCE = Path(__file__).with_name("memory.c")
DATA = (b"abcdefghij" * 2000)[: 2 * 4096 + 2048]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """memory.c, in a folder of its own."""
    path = tmp_path_factory.mktemp("memory") / "memory"
    subprocess.run(["cc", "-O1", "-static", "-pthread", "-o", path, SOURCE], check=True)
    return path


def compare(engine: str, program: Path, folder: Path, parts: list[str], memory: str) -> str:
    """What the program writes, the same inside as outside."""
    (folder / "data").write_bytes(DATA)
    wanted = subprocess.run([program, *parts], cwd=folder, capture_output=True, check=True).stdout
    (folder / "data").write_bytes(DATA)
    with Process(
        ["/p/memory", *parts],
        ro=[(program.parent, "/p")],
        rw=[(folder, "/d")],
        cwd="/d",
        memory=memory,
        engine=engine,
    ) as process:
        result = process.run(timeout=60)
    assert (result.reason, result.status, result.stderr) == ("exited", 0, b""), (
        result.stdout.decode()
    )
    assert result.stdout.decode() == wanted.decode()
    return wanted.decode()


PARTS = ["errors", "anonymous", "stacks", "files", "shared", "written", "forked"]


@pytest.mark.parametrize("part", PARTS)
def test_as_on_the_host(engine: str, program: Path, tmp_path: Path, part: str) -> None:
    assert len(compare(engine, program, tmp_path, [part], "128M")) > 5


@pytest.mark.parametrize("kind", ["touch", "read", "grow"])
def test_more_than_the_limit(engine: str, program: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "more.c"
    source.write_text(
        r"""
        #define _GNU_SOURCE
        #include <fcntl.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/mman.h>
        #include <unistd.h>
        int main(int count, char **names) {
            size_t most = 256ul << 20;
            int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, done = 0;
            if (strcmp(names[1], "grow") == 0) {  // in what it can have, and asks for
                while (mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                       != MAP_FAILED) ++done;
                printf("%d\n", done);
                return 0;
            }
            char *at = mmap(0, most, PROT_READ | PROT_WRITE, flags, -1, 0);
            if (at == MAP_FAILED) return 1;
            if (strcmp(names[1], "touch") == 0) for (size_t n = 0; n < most; n += 4096) at[n] = 1;
            int fd = open("/dev/zero", O_RDONLY);
            for (size_t n = 0; n < most; n += 1 << 20) if (read(fd, at + n, 1 << 20) < 0) return 2;
            return count;
        }
        """
    )
    subprocess.run(["cc", "-O1", "-static", "-o", tmp_path / "more", source], check=True)
    with Process(["/p/more", kind], ro=[(tmp_path, "/p")], memory="32M", engine=engine) as process:
        result = process.run(timeout=30)
    if kind == "grow":
        assert result.reason == "exited"
        assert 24 <= int(result.stdout) <= 32
    else:
        assert result.reason == "memory"


def test_the_limit_is_everybodys(engine: str, tmp_path: Path) -> None:
    source = tmp_path / "many.c"
    source.write_text(
        r"""
        #include <stdio.h>
        #include <sys/mman.h>
        #include <sys/wait.h>
        #include <unistd.h>
        int main(void) {
            int ends[2], good = 0, status;
            if (pipe(ends) != 0) return 1;
            for (int n = 0; n < 8; n++) {
                pid_t child = fork();
                if (child < 0) break;
                if (child != 0) continue;
                char *at = mmap(0, 8 << 20, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
                for (int at_page = 0; at_page < 2048; at_page++) at[at_page * 4096] = 1;
                char byte;
                close(ends[1]);
                (void)!read(ends[0], &byte, 1);  // until all have theirs, or cannot
                return 7;
            }
            sleep(1);
            close(ends[1]);
            while (wait(&status) > 0) good += WIFEXITED(status) && WEXITSTATUS(status) == 7;
            printf("%d\n", good);
            return 0;
        }
        """
    )
    subprocess.run(["cc", "-O1", "-static", "-o", tmp_path / "many", source], check=True)
    with Process(["/p/many"], ro=[(tmp_path, "/p")], memory="32M", engine=engine) as process:
        result = process.run(timeout=30)
    assert result.reason == "exited"
    assert 1 <= int(result.stdout) <= 3
