"""`polyvisor walk`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from polyvisor.cli import output, status
from polyvisor.errors import ConfigError
from polyvisor.memory_image import MemoryImage
from polyvisor.mmu import DEFAULT_MAXPHYADDR, MODES, Access, AddressSpace, Paging
from polyvisor.virtual import Range, Ranges

if TYPE_CHECKING:
    from polyvisor.mmu_walk import Walk

#: Some addresses cannot be accessed that way.
FAULTS = 1


def walk(
    image: Path,
    addresses: list[str],
    *,
    cr3: str,
    paging: str,
    base: str,
    maxphyaddr: int | None,
    access: str,
    user: bool,
    ranges: bool,
    picture: Path | None,
    as_json: bool,
) -> int:
    """Prints what was asked for and returns the exit status for the shell."""
    try:
        if paging not in MODES or paging == "none":
            names = ", ".join(name for name in MODES if name != "none")
            raise ConfigError(f"there is no format '{paging}'; choose one of {names}")
        wanted = [_number("the address", text) for text in addresses]
        options: dict[str, Any] = {
            "cr3": _number("--cr3", cr3),
            "paging": cast("Paging", paging),
            "maxphyaddr": DEFAULT_MAXPHYADDR if maxphyaddr is None else maxphyaddr,
        }
        first = _number("--base", base)
        if not (wanted or ranges or picture):
            raise ConfigError("nothing to do: give addresses, --ranges or --map FILE")
        with MemoryImage(image, first) as opened:
            space = opened.mmu(**options)
            walks = [space.walk(gva, cast("Access", access), user=user) for gva in wanted]
            found = space.ranges() if ranges or picture else None
            if found is not None:
                found.title = f"{image.name}, cr3 {options['cr3']:#x}, {paging} paging"
            if picture is not None and found is not None:
                found.save(os.fspath(picture))
            if as_json:
                output.write_json(_document(opened, space, walks, found if ranges else None))
            else:
                _print(opened, walks, found if ranges else None)
    except ConfigError as error:
        status.say(str(error))
        return status.USAGE
    return status.OK if all(item.ok for item in walks) else FAULTS


def _number(what: str, text: str) -> int:
    digits = text.replace("_", "").replace("`", "").lower()
    if re.fullmatch(r"0x[0-9a-f]+", digits):
        value = int(digits, 16)
    elif re.fullmatch(r"[0-9]+", digits):
        value = int(digits)
    elif re.fullmatch(r"[0-9a-f]+", digits):
        raise ConfigError(f"{what} '{text}' looks hexadecimal; write 0x{digits}")
    else:
        raise ConfigError(f"{what} '{text}' is not a number; write it as 0x1234 or in decimal")
    if value >> 64:
        raise ConfigError(f"{what} {text} has more than 64 bits")
    return value


def _beyond(image: MemoryImage, item: Walk) -> str:
    """What to add when the address leads out of the image."""
    if item.physical is None or image.base <= item.physical < image.end:
        return ""
    return f"{item.physical:#x} is not in the image, which ends at {image.end:#x}"


def _print(image: MemoryImage, walks: list[Walk], ranges: Ranges | None) -> None:
    parts = []
    for item in walks:
        text = str(item)
        if note := _beyond(image, item):
            text += f"\n   {note}"
        parts.append(text)
    if ranges is not None:
        parts.append(str(ranges))
    if parts:
        output.write_all(1, ("\n\n".join(parts) + "\n").encode())


def _document(
    image: MemoryImage, space: AddressSpace, walks: list[Walk], ranges: Ranges | None
) -> dict[str, Any]:
    """Addresses and entries are hexadecimal text: not every reader of JSON has 64-bit numbers."""
    result: dict[str, Any] = {
        "image": image.path,
        "base": hex(image.base),
        "size": image.size,
        "cr3": hex(space.cr3),
        "paging": space.mode,
        "walks": [_walk(image, item) for item in walks],
    }
    if ranges is not None:
        result["ranges"] = [_range(item) for item in ranges]
        result["truncated"] = ranges.truncated
    return result


def _walk(image: MemoryImage, item: Walk) -> dict[str, Any]:
    result: dict[str, Any] = {
        "gva": hex(item.gva),
        "access": item.access,
        "ok": item.ok,
        "physical": None if item.physical is None else hex(item.physical),
        "in_image": item.physical is not None and not _beyond(image, item),
    }
    if item.physical is not None:
        result |= {
            "page_size": item.page_size,
            "user": item.user,
            "writable": item.writable,
            "executable": item.executable,
            "global": item.is_global,
            "accessed": item.accessed,
            "dirty": item.dirty,
            "memory_type": item.memory_type,
            "key": item.key,
        }
    result["levels"] = [
        {
            "name": level.name,
            "index": level.index,
            "address": None if level.address is None else hex(level.address),
            "entry": hex(level.entry),
            "covers": level.size,
            "flags": list(level.flags),
            "in_image": level.in_memory,
        }
        for level in item.levels
    ]
    if item.fault is not None:
        result["fault"] = {
            "kind": item.fault.kind,
            "vector": item.fault.vector,
            "error_code": item.fault.error_code,
            "reason": item.fault.reason,
        }
    return result


def _range(item: Range) -> dict[str, Any]:
    return {
        "gva": hex(item.gva),
        "physical": hex(item.physical),
        "size": item.size,
        "page_size": item.page_size,
        "user": item.user,
        "writable": item.writable,
        "executable": item.executable,
        "global": item.is_global,
    }
