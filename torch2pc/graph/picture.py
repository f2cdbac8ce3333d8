"""Where the layers of a graph lie in a picture of it, and that picture as an SVG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

# Of a place: how wide and high it is, with what lies between; and the box in it.
WIDE, HIGH = 110, 60
BOX_WIDE, BOX_HIGH = 96, 28


def levels(parents: Sequence[Sequence[int]]) -> list[int]:
    """For each place, how many layers there are on the longest way to it from the input."""
    found = [0]
    for of_layer in parents:
        found.append(1 + max(found[p] for p in of_layer))
    return found


def centres(parents: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """For each place (x, y): the input at y = 0, each level one higher, its places side by side."""
    level = levels(parents)
    found = []
    for i, y in enumerate(level):
        beside = [j for j, other in enumerate(level) if other == y]
        found.append((beside.index(i) - (len(beside) - 1) / 2, float(y)))
    return found


def drawn(
    names: Sequence[str],
    parents: Sequence[Sequence[int]],
    above: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """An SVG picture of a graph: the input below, arrows from parents to their children.

    ``above``: the parents of second predictions, by the names of their beliefs, with dashed arrows.
    """
    places, lines, right = centres(parents), [], 0.0
    left, top = min(x for x, _ in places) - 0.5, max(y for _, y in places) + 0.5
    pixels = [((x - left) * WIDE, (top - y) * HIGH) for x, y in places]
    for l, of_layer in enumerate(parents, start=1):
        for p in of_layer:
            (x0, down), (x1, up) = pixels[p], pixels[l]
            y0, y1 = places[p][1], places[l][1]
            between = [x for x, (_, y) in zip(pixels, places, strict=True) if y0 < y < y1]
            a, b = x0, x1
            if between:
                # A skip goes round what lies between: it comes three quarters of the way to these points.
                edge = max(x for x, _ in between) + BOX_WIDE / 2 + 6 * len(between)
                right = max(right, edge)
                a = b = max(x0, x1) + max(edge - max(x0, x1), 0) / 0.75
            start, end = down - BOX_HIGH / 2, up + BOX_HIGH / 2 + 1
            quarter = (start - end) / 4
            path = (
                f"M{x0:.0f},{start:.0f} C{a:.0f},{start - quarter:.0f} {b:.0f},{end + quarter:.0f}"
            )
            lines.append(
                f'<path d="{path} {x1:.0f},{end:.0f}" fill="none" stroke="#888" '
                'marker-end="url(#torch2pc-arrow)"/>'
            )
    for name, of_layer in (above or {}).items():
        x1, y1 = pixels[names.index(name)]
        for p in of_layer:
            x0, y0 = pixels[p]
            edge = (
                BOX_HIGH / 2 if y0 < y1 else -BOX_HIGH / 2
            )  # beside the arrow that goes the other way
            lines.append(
                f'<path d="M{x0 + 16:.0f},{y0 + edge:.0f} L{x1 + 16:.0f},{y1 - edge:.0f}" fill="none" '
                'stroke="#888" stroke-dasharray="4 3" marker-end="url(#torch2pc-arrow)"/>'
            )
    for name, (x, y) in zip(names, pixels, strict=True):
        corner = f'x="{x - BOX_WIDE / 2:.0f}" y="{y - BOX_HIGH / 2:.0f}"'
        # A long name is squeezed into its box.
        squeezed = f' textLength="{BOX_WIDE - 8}" lengthAdjust="spacingAndGlyphs"'
        lines.append(
            f'<rect {corner} width="{BOX_WIDE}" height="{BOX_HIGH}" rx="6" fill="#e8eef7" '
            f'stroke="#446"/><text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" font-size="12" '
            f'font-family="sans-serif"{squeezed if len(name) > 13 else ""}>{html.escape(name)}</text>'
        )
    width = max(max(x for x, _ in pixels) + WIDE / 2, right + 8)
    arrow = (
        '<defs><marker id="torch2pc-arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="#888"/></marker></defs>'
    )
    size = f'width="{width:.0f}" height="{(top + 0.5) * HIGH:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{arrow}{"".join(lines)}</svg>'
