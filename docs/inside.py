"""Writes README's table of what is inside, as `fedjax-qp list` knows it. The tests check that it is up to date.

Command: python docs/inside.py
"""

from pathlib import Path

from fedjax_qp.settings.catalogue import entries

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- parts: made from `fedjax-qp list` by docs/inside.py -->\n"
END = "<!-- end of parts -->"
ROWS = {
    "methods, any model": ("algorithms", "all"),
    "methods, LoRA": ("algorithms", "instructions"),
    "data": ("sources", None),
    "partitions": ("partitions", None),
    "models": ("models", None),
}


def table() -> str:
    """A row for each kind of parts, with their names."""
    lines = ["| kind | names |", "| :-- | :-- |"]
    for title, (registry, suits) in ROWS.items():
        found = [one for one in entries() if one.registry == registry and (suits is None or suits in one.suits)]
        lines.append(f"| {title} | {', '.join(f'`{one.name}`' for one in found)} |")
    return "\n".join([*lines, ""])


def with_table(text: str) -> str:
    """README's text with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
