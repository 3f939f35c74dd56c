"""Draws the README's picture, speculation over plain decoding, from its table in docs/results/user-experience.md.

    python scripts/readme_picture.py

Writes docs/images/speculation.svg, or the file that --out names. It needs matplotlib (`pip install -e '.[bench]'`).
tests/test_documentation.py checks that the committed picture shows the figures of the table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
TABLE = _ROOT / "docs" / "results" / "user-experience.md"
PICTURE = _ROOT / "docs" / "images" / "speculation.svg"
_HEADER = "| target | temperature | clients | ratio | from | to |"
_GAIN_COLOUR, _LOSS_COLOUR = "#2a7f62", "#b5543c"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of the table: tokens a second with speculation, divided by those without."""

    label: str
    ratio: float
    lowest: float
    highest: float


def read_table(text: str) -> list[Measurement]:
    """The measurements in the page's table; raises ValueError if the page does not have it."""
    lines = text.splitlines()
    start = lines.index(_HEADER) + 2
    measurements = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        target, temperature, clients, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        ratio, lowest, highest = map(float, numbers)
        label = f"{target}, temperature {temperature}, {clients} client" + ("s" if clients != "1" else "")
        measurements.append(Measurement(label=label, ratio=ratio, lowest=lowest, highest=highest))
    return measurements


def draw(measurements: list[Measurement], out: Path) -> None:
    """Write the picture: a bar for each measurement, from 1 (plain decoding) to its ratio, and its range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text, and nothing depends on the day: the same table gives the same file.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "aurora-lit", "font.size": 10}
    figure, axes = pyplot.subplots(figsize=(7.2, 0.9 + 0.42 * len(measurements)), layout="constrained")
    positions = list(range(len(measurements)))
    for position, row in zip(positions, measurements, strict=True):
        colour = _GAIN_COLOUR if row.ratio >= 1 else _LOSS_COLOUR
        axes.barh(position, row.ratio - 1, left=1, height=0.6, color=colour)
        axes.plot([row.lowest, row.highest], [position, position], color="#444444", linewidth=1)
        axes.text(max(row.highest, 1) + 0.02, position, f"{row.ratio:.2f}", va="center")
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_yticks(positions, [row.label for row in measurements])
    axes.invert_yaxis()
    axes.set_xlim(min(row.lowest for row in measurements) - 0.05, max(row.highest for row in measurements) + 0.15)
    axes.set_xlabel("tokens a second, with / without speculation\n(line: range in the table)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    """Read the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture; its suffix says the format")
    arguments = parser.parse_args()
    draw(read_table(TABLE.read_text()), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
