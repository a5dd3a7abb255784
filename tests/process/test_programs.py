"""Larger programs of Debian, each beside itself outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_process import outside

from polyvisor import Process

DATABASE = """
create table t(a integer primary key, b text);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 500)
    insert into t select i, 'text ' || i from n;
begin; update t set b = 'x' where a % 3 = 0; rollback;
begin immediate; delete from t where a % 2 = 0; commit;
create index i on t(b);
select count(*), sum(a), max(b) from t;
pragma integrity_check;
"""
GIT = """
export HOME=$PWD GIT_AUTHOR_DATE='2024-01-01 00:00 +0000'
export GIT_COMMITTER_DATE="$GIT_AUTHOR_DATE"
git config --global user.email a@b.c; git config --global user.name A
git init -q -b main r && cd r && echo one > a && git add a && git commit -qm first
echo two >> a && git commit -qam second && git log --format='%H %s' && git status --short
git gc -q; git clone -q . ../c && ls ../c
"""
PROGRAMS = [
    ["sqlite3", "a.db", DATABASE],
    ["sh", "-c", "seq 1000 | fzf -f 42 | sort"],  # Go
    ["sh", "-c", GIT],
    ["sh", "-c", "mkdir d && seq 99 > d/x && tar czf a.tgz d && tar xOzf a.tgz d/x | md5sum"],
    ["make", "-s", "-j3", "-f", "rules"],
]


@pytest.mark.parametrize("argv", PROGRAMS, ids=lambda argv: " ".join(argv)[:20])
def test_they_do_as_they_do_outside(engine: str, argv: list[str], tmp_path: Path) -> None:
    rules = "all: a b c\n\t@cat a b c\n%:\n\t@sleep 0.05; echo made $@ > $@\n"
    (tmp_path / "rules").write_text(rules)
    wanted = outside(argv, tmp_path)
    with Process(argv, files={"rules": rules}, engine=engine) as process:
        result = process.run(timeout=100)
    assert result.stderr.decode() == wanted.stderr.decode()
    assert result.stdout == wanted.stdout
    assert (result.reason, result.status) == ("exited", wanted.returncode)
