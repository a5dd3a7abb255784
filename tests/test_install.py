"""What others get: the installed CMake package, and the wheel."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Runs a command; a failure shows all of its output."""
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} gave status {done.returncode}:\n{done.stdout}")
    return done.stdout


def test_a_cpp_program_links_the_installed_core(
    root: Path, native_build: Path, tmp_path: Path
) -> None:
    prefix, build = tmp_path / "prefix", tmp_path / "build"
    run("cmake", "--install", native_build, "--component", "cpp", "--prefix", prefix)
    run(
        "cmake",
        *("-S", root / "tests" / "cmake_consumer", "-B", build, "-G", "Ninja"),
        f"-DCMAKE_PREFIX_PATH={prefix}",
    )
    run("cmake", "--build", build)
    assert run(build / "consumer") == "ok\n"

    # Nothing of the installed package may point back into the build.
    for path in (prefix / "lib" / "cmake").rglob("*.cmake"):
        assert str(root) not in path.read_text(), path


@pytest.mark.slow
@pytest.mark.timeout(900)  # compiles everything when there is no compiler cache to help
def test_the_wheel_is_whole(root: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, root)
    [wheel] = tmp_path.glob("polyvisor-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = root / "python" / "polyvisor"
    sources = {f"polyvisor/{path.relative_to(package)}" for path in package.rglob("*.py*")}
    sources = {name for name in sources if "__pycache__" not in name}
    assert sources <= set(names)
    programs = {f"guest/{name}-{cpu}" for name in ("init", "agent") for cpu in ("x86_64", "i386")}
    parts = {"py.typed", "guest/polyvisor-agent.service", *programs}
    assert {f"polyvisor/{part}" for part in parts} <= set(names)
    modules = sorted(name.split(".")[0] for name in names if name.endswith(".so"))
    assert modules == ["polyvisor/_fast", "polyvisor/_native", "polyvisor/_ring"]
    assert not [name for name in names if name.endswith((".cpp", ".hpp", ".a", ".o"))]

    target = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel)
    # -S: without the .pth files that lead to this tree.
    paths = [str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    program = f"import sys; sys.path[:0] = {paths}; import polyvisor; print(polyvisor.__file__)"
    where = run(sys.executable, "-I", "-S", "-c", program, cwd=tmp_path)
    assert where.startswith(str(target))


def test_versions_agree(root: Path) -> None:
    from importlib.metadata import version

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert (
        f"project(polyvisor VERSION {version('polyvisor')} "
        in (root / "CMakeLists.txt").read_text()
    ), "the installed version is another; run 'make setup' after 'rm -r .venv'"
