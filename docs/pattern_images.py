"""Draws the picture of every page in docs/patterns from its own code: python docs/pattern_images.py"""

import re
from pathlib import Path

import matplotlib.pyplot as plt

DOCS = Path(__file__).parent


def main() -> None:
    for page in sorted((DOCS / "patterns").glob("*.md")):
        [code] = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        names: dict = {}
        exec(code, names)
        axes = names["mask"].plot()
        axes.set_title("")
        axes.figure.set_size_inches(3.2, 3.2)
        axes.figure.savefig(DOCS / "images" / "patterns" / f"{page.stem}.png", dpi=110)
        plt.close(axes.figure)


if __name__ == "__main__":
    main()
