"""An address space as a picture.

Address spaces are nearly empty: drawn to one scale, Linux's would be three dots. So it is cut at
its largest holes into stretches, each a row with a scale of its own; what was cut out stands
between the rows. Where several ranges fall on one point, the one with most bytes there has its
colour.
"""

from __future__ import annotations

import heapq
import html
import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from polyvisor.errors import ConfigError, HostError
from polyvisor.pixel_font import ADVANCE, HEIGHT, glyph
from polyvisor.virtual import Range, Ranges

#: Stretches in a picture, at most.
ROWS = 28
#: A stretch is cut at its largest hole when that is more than this part of it.
HOLE = 0.2

WIDTH = 920
BAR_LEFT, BAR_WIDTH = 136, 560
TOP, ROW, BAR = 40, 30, 18

WHITE, BLACK, GREY, PALE = "#ffffff", "#1f2328", "#6e7781", "#eef0f2"
#: (user, writable, executable): what it is called and its colour.
KINDS: dict[tuple[bool, bool, bool], tuple[str, str]] = {
    (True, False, True): ("user code", "#2da44e"),
    (True, False, False): ("user, read-only", "#a6dcb4"),
    (True, True, False): ("user, writable", "#eac54f"),
    (True, True, True): ("user, writable and executable", "#cf222e"),
    (False, False, True): ("supervisor code", "#0969da"),
    (False, False, False): ("supervisor, read-only", "#9ecbff"),
    (False, True, False): ("supervisor, writable", "#8250df"),
    (False, True, True): ("supervisor, writable and executable", "#bf3989"),
}


@dataclass
class _Rectangle:
    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str = ""


@dataclass
class _Text:
    x: float
    y: float  # of the baseline
    text: str
    colour: str = BLACK
    bold: bool = False


@dataclass
class _Scene:
    """What is drawn, in units of which a character is 6 wide."""

    height: float = 0.0
    rectangles: list[_Rectangle] = field(default_factory=list)
    texts: list[_Text] = field(default_factory=list)


def svg(ranges: Ranges) -> str:
    """The picture as an SVG document."""
    scene = _draw(ranges)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {scene.height:g}" '
        f'width="{WIDTH}" height="{scene.height:g}" font-family="monospace" font-size="10">',
        f'<rect width="{WIDTH}" height="{scene.height:g}" fill="{WHITE}"/>',
    ]
    for item in scene.rectangles:
        shape = (
            f'<rect x="{item.x:g}" y="{item.y:g}" width="{item.width:g}" '
            f'height="{item.height:g}" fill="{item.colour}"'
        )
        title = f"><title>{html.escape(item.title)}</title></rect>" if item.title else "/>"
        parts.append(shape + title)
    for text in scene.texts:
        weight = ' font-weight="bold"' if text.bold else ""
        # The length is given: not all monospace fonts are equally wide.
        parts.append(
            f'<text x="{text.x:g}" y="{text.y:g}" textLength="{len(text.text) * ADVANCE}" '
            f'fill="{text.colour}"{weight} xml:space="preserve">{html.escape(text.text)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def png(ranges: Ranges, scale: int = 2) -> bytes:
    """The picture as a PNG file, `scale` pixels to a unit."""
    scene = _draw(ranges)
    width, height = WIDTH * scale, round(scene.height * scale)
    used = {item.colour for item in scene.rectangles} | {text.colour for text in scene.texts}
    colours = [WHITE, *sorted(used - {WHITE})]
    index = {colour: number for number, colour in enumerate(colours)}
    pixels = bytearray(width * height)

    def fill(x0: int, y0: int, x1: int, y1: int, colour: int) -> None:
        x0, x1 = max(x0, 0), min(x1, width)
        line = bytes([colour]) * (x1 - x0)
        for y in range(max(y0, 0), min(y1, height)):
            pixels[y * width + x0 : y * width + x0 + len(line)] = line

    for item in scene.rectangles:
        left, top = round(item.x * scale), round(item.y * scale)
        right = max(round((item.x + item.width) * scale), left + 1)
        bottom = max(round((item.y + item.height) * scale), top + 1)
        fill(left, top, right, bottom, index[item.colour])
    for text in scene.texts:
        top = round(text.y * scale) - HEIGHT * scale
        for at, character in enumerate(text.text):
            left = round((text.x + at * ADVANCE) * scale)
            for x, y in glyph(character):
                wide = scale + 1 if text.bold else scale
                fill(
                    left + x * scale,
                    top + y * scale,
                    left + x * scale + wide,
                    top + (y + 1) * scale,
                    index[text.colour],
                )
    lines = b"".join(b"\0" + pixels[y * width : (y + 1) * width] for y in range(height))
    palette = b"".join(bytes.fromhex(colour[1:]) for colour in colours)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        + _chunk(b"PLTE", palette)
        + _chunk(b"IDAT", zlib.compress(lines, 9))
        + _chunk(b"IEND", b"")
    )


def save(ranges: Ranges, path: str) -> None:
    """Writes a file; its name says in which format."""
    ending = path.lower().rpartition(".")[2]
    if ending not in ("svg", "png"):
        raise ConfigError(
            f"cannot draw to '{path}': the name of a picture ends in .svg or .png", field="path"
        )
    data = svg(ranges).encode() if ending == "svg" else png(ranges)
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as problem:
        raise HostError(
            f"cannot write the picture {path}: {problem.strerror}",
            errno=problem.errno or 0,
            path=path,
        ) from None


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _draw(ranges: Ranges) -> _Scene:
    scene = _Scene()
    title = ranges.title.strip("<>") or "address space"
    scene.texts.append(_Text(10, 18, _clip(title, 110), bold=True))
    items = list(ranges)
    note = f"{len(items)} ranges, {_about(sum(item.size for item in items))} mapped"
    if ranges.next is not None:
        note += f"; cut short: there is more from {ranges.next:#x} on"
    scene.texts.append(_Text(10, 31, note, GREY))
    y = float(TOP)
    before: int | None = None
    for first, last in stretches(items):
        start, end = items[first].gva, items[last].end
        if before is not None:
            gap = f"... {_about(start - before)} not mapped"
            if before <= 1 << 63 <= start:
                gap = "... the upper half of the address space"
            scene.texts.append(_Text(BAR_LEFT, y + 8, gap, GREY))
        y += 12
        _row(scene, items[first : last + 1], start, end, y)
        y += ROW - 8
        before = end
    y += 14
    _legend(scene, items, y)
    scene.height = y + 14 * ((len({kind(item) for item in items}) + 1) // 2) + 16
    return scene


def _row(scene: _Scene, items: list[Range], start: int, end: int, y: float) -> None:
    scene.texts.append(_Text(10, y + 12, f"{start:#018x}"))
    scene.rectangles.append(_Rectangle(BAR_LEFT, y, BAR_WIDTH, BAR, PALE))
    for left, right, colour, tip in _points(items, start, end):
        scene.rectangles.append(_Rectangle(BAR_LEFT + left, y, right - left, BAR, colour, tip))
    mapped, span = sum(item.size for item in items), end - start
    size = _about(mapped)
    if size != _about(span):
        size += f" in {_about(span)}"
    smallest = min(item.page_size for item in items)
    largest = max(item.page_size for item in items)
    pages = _about(smallest) if smallest == largest else f"{_about(smallest)} to {_about(largest)}"
    x = BAR_LEFT + BAR_WIDTH + 8
    scene.texts.append(_Text(x, y + 8, size))
    scene.texts.append(_Text(x, y + 17, f"pages of {pages}", GREY))


def _legend(scene: _Scene, items: Iterable[Range], y: float) -> None:
    sizes: Counter[tuple[bool, bool, bool]] = Counter()
    for item in items:
        sizes[kind(item)] += item.size
    shown = [key for key in KINDS if key in sizes]
    for at, key in enumerate(shown):
        name, colour = KINDS[key]
        x, row = 10 + at % 2 * 400, y + at // 2 * 14
        scene.rectangles.append(_Rectangle(x, row, 10, 10, colour))
        scene.texts.append(_Text(x + 16, row + 9, f"{name}: {_about(sizes[key])}"))


def kind(item: Range) -> tuple[bool, bool, bool]:
    """What decides about its colour; a key of `KINDS`."""
    return item.user, item.writable, item.executable


def stretches(items: list[Range]) -> list[tuple[int, int]]:
    """(first, last) index of each stretch: cut where the largest hole is too much of it, those with
    the most hole first, until there are `ROWS`."""
    if not items:
        return []
    done: list[tuple[int, int]] = []
    heap: list[tuple[float, int, int, int]] = []

    def consider(first: int, last: int) -> None:
        span = items[last].end - items[first].gva
        hole, at = 0, first
        for index in range(first, last):
            size = items[index + 1].gva - items[index].end
            if size > hole:
                hole, at = size, index
        if hole > HOLE * span:
            heapq.heappush(heap, (-hole / span, first, last, at))
        else:
            done.append((first, last))

    consider(0, len(items) - 1)
    while heap and len(done) + len(heap) < ROWS:
        _, first, last, at = heapq.heappop(heap)
        consider(first, at)
        consider(at + 1, last)
    return sorted(done + [(first, last) for _, first, last, _ in heap])


def _points(items: list[Range], start: int, end: int) -> list[tuple[float, float, str, str]]:
    """(left, right, colour, what it is) of what is drawn of a stretch, adjacent points joined."""
    span = end - start
    bytes_at: dict[int, Counter[tuple[bool, bool, bool]]] = {}
    whole: dict[int, str] = {}
    for item in items:
        first = (item.gva - start) * BAR_WIDTH // span
        last = (item.end - 1 - start) * BAR_WIDTH // span
        for point in range(first, last + 1):
            low = max(item.gva, start + point * span // BAR_WIDTH)
            high = min(item.end, start + (point + 1) * span // BAR_WIDTH)
            bytes_at.setdefault(point, Counter())[kind(item)] += max(high - low, 1)
            if point not in whole:
                whole[point] = str(item)
    result: list[tuple[float, float, str, str]] = []
    for point in sorted(bytes_at):
        ((key, _),) = bytes_at[point].most_common(1)
        colour = KINDS[key][1]
        if result and result[-1][1] == point and result[-1][2] == colour:
            left, _, _, tip = result.pop()
            result.append((left, point + 1, colour, tip))
        else:
            result.append((point, point + 1, colour, f"{KINDS[key][0]}: {whole[point]}"))
    return result


def _about(size: int) -> str:
    """A size to three digits: "4 KiB", "1.25 GiB", "128 TiB"."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


__all__ = ["png", "save", "stretches", "svg"]
