"""`polyvisor doctor`."""

from __future__ import annotations

from polyvisor import doctor
from polyvisor.cli import output, status

_MARKS = {"good": ("ok", "green"), "poor": ("so-so", "yellow"), "missing": ("no", "red")}


def examine(*, as_json: bool) -> int:
    """Prints the report; the status is 0 when `polyvisor exec` can work here."""
    report = doctor.examine()
    if as_json:
        output.write_json(report.as_dict())
    else:
        _print(report)
    return status.OK if report.ok else status.GUEST_FAILED


def _print(report: doctor.Report) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)

    def show(finding: doctor.Finding) -> None:
        mark, colour = _MARKS[finding.verdict]
        line = Text(f"  {mark:5} ", style=colour)
        line.append(f"{finding.name:10} ", style="bold")
        line.append(finding.text, style="default")
        console.print(line)
        if finding.advice:
            console.print(Text(f"  {'':5} {'':10} what helps: {finding.advice}", style="default"))

    host = report.host
    console.print(f"polyvisor {report.version}, Python {host['python']}, Linux {host['kernel']}")
    console.print(
        f"{host['cpu']}, {host['cpus']} CPUs, {host['memory'] / (1 << 30):.1f} GiB; "
        f"features: {' '.join(host['features']) or 'none of those that matter'}"
    )
    console.print("\nEngines", style="bold")
    for finding in report.engines:
        show(finding)
    taken = f"--engine auto takes {report.engine}" if report.engine else "no engine works here"
    console.print(f"  {'':5} {taken}")
    console.print("\nFor polyvisor exec", style="bold")
    for finding in report.tools:
        show(finding)
