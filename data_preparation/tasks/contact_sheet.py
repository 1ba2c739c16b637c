"""Draw a contact sheet: photographs, and what every task makes of them.

python -m data_preparation.tasks.contact_sheet [--output docs/pictures/tasks.jpg] [--photos FILE ...] [--side 256]
"""

from __future__ import annotations

import argparse
from pathlib import Path

PHOTOS = Path(__file__).resolve().parents[2] / "assets" / "photos"


def draw_sheet(paths: list[Path], side: int, seed: int, columns: int = 6):
    """PIL image, a block of rows for each photograph: clean, degraded, cartoonized squares of `side` pixels."""
    from PIL import Image, ImageDraw, ImageFont

    from data_preparation.photographs import centre_square, read_photograph, row_generator
    from data_preparation.tasks.cartoon import cartoonize
    from data_preparation.tasks.degradations import DEGRADATIONS

    head, font = max(14, side // 11), ImageFont.load_default(max(11, side // 15))
    names = ["clean", *(name for name in DEGRADATIONS if name != "identity"), "cartoonize"]
    lines = -(-len(names) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) + 4, len(paths) * lines * (side + head + 4) + 4), "white")
    ink = ImageDraw.Draw(sheet)
    for block, path in enumerate(paths):
        clean = centre_square(read_photograph(path), side)
        for index, name in enumerate(names):
            picture = clean
            if name == "cartoonize":
                picture = cartoonize(clean)
            elif name in DEGRADATIONS:
                picture, _ = DEGRADATIONS[name](clean, row_generator(seed + block, index))
            left = 4 + index % columns * (side + 4)
            top = 4 + (block * lines + index // columns) * (side + head + 4)
            ink.text((left, top), name, fill="black", font=font)
            sheet.paste(Image.fromarray(picture), (left, top + head))
    return sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/tasks.jpg"))
    parser.add_argument(
        "--photos",
        nargs="+",
        type=Path,
        default=[PHOTOS / name for name in ("astronaut.jpg", "garden_1.jpg", "coffee.jpg")],
    )
    parser.add_argument("--side", type=int, default=256, help="of each picture, pixels (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    draw_sheet(args.photos, args.side, args.seed).save(args.output, quality=82)
    print(f"drew {args.output}")


if __name__ == "__main__":
    main()
