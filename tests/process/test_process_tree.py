"""The files that a program is given: folders of its own are empty and gone afterwards, though they
are used again, and a place can be made for what else it is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polyvisor.errors import ConfigError
from polyvisor.process_tree import OWN, ProcessTree


def tree(**given: object) -> ProcessTree:
    return ProcessTree(**{"root": None, "ro": (), "rw": (), "files": {}, **given})  # type: ignore[arg-type]


def own(made: ProcessTree) -> dict[str, Path]:
    return {name: Path(made.on_host(place)) for name, place in OWN.items()}


def test_folders_are_empty_when_they_are_used_again(tmp_path: Path) -> None:
    first = tree(files={"a": "1", "b/c": b"2"})
    folders = own(first)
    assert (folders["work"] / "a").read_text() == "1"
    (folders["tmp"] / "deep" / "er").mkdir(parents=True)
    (folders["tmp"] / "out").symlink_to(tmp_path)
    (tmp_path / "stays").touch()
    first.close()
    first.close()
    second = tree()
    assert own(second) == folders
    assert [list(folder.iterdir()) for folder in folders.values()] == [[], [], []]
    assert (tmp_path / "stays").exists()
    third = tree()
    assert own(third)["work"] != folders["work"]
    second.close()
    third.close()


def test_folders_with_other_rights_are_not_used_again() -> None:
    first = tree()
    folders = own(first)
    folders["work"].chmod(0o500)
    first.close()
    assert not folders["work"].exists()


def test_a_tree_that_nobody_closed_is_removed() -> None:
    first = tree(files={"a": "1"})
    work = own(first)["work"]
    del first
    assert not work.exists()


def test_nothing_is_left_of_a_host_process() -> None:
    """Neither by one that ends, nor by a forked child too early."""
    script = """if True:
        import os, sys
        from polyvisor.process_tree import ProcessTree
        first, second = (ProcessTree(None, (), (), {"a": "1"}) for _ in range(2))
        first.close()
        if os.fork() == 0:
            sys.exit()  # with all that is done then
        os.wait()
        print(open(second.on_host("/work/a")).read(), second.on_host("/"), second.on_host("/work"))
    """
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0] == "1"
    assert not Path(said[1]).exists()
    assert not Path(said[2]).exists()


def test_trees_that_look_the_same_share_their_root(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    trees = [tree(), tree(), tree(ro=[(given, "/srv/data")]), tree(rw=[(given, "/srv/data")])]
    roots = [made.on_host("/") for made in trees]
    assert roots[0] == roots[1] != roots[2] == roots[3]
    assert os.path.isdir(roots[2] + "/srv/data")
    assert not os.path.exists(roots[0] + "/srv")
    assert trees[2].on_host("/srv/data/x") == f"{given}/x"
    for made in trees:
        made.close()


def test_more_roots_than_are_kept(tmp_path: Path) -> None:
    for n in range(70):
        made = tree(ro=[(tmp_path, f"/many/{n}")])
        root = made.on_host("/")
        assert os.path.isdir(f"{root}/many/{n}")
        made.close()
    assert not os.path.exists(root)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"ro": ["/nowhere"]}, "ro"),
        ({"rw": ["/nowhere"]}, "rw"),
        ({"ro": [("/usr", "relative")]}, "place"),
        ({"ro": [("/usr", "/usr/nowhere")]}, "place"),
        ({"root": "/usr", "ro": [("/etc", "/nowhere")]}, "place"),
        ({"files": {"../a": ""}}, "files"),
        ({"files": {"/a": ""}}, "files"),
        ({"files": {"": ""}}, "files"),
    ],
)
def test_impossible_trees(given: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        tree(**given)
    assert error.value.field == field
