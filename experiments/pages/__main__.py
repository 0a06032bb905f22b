"""Measured figures of the pages in `docs/`, written into them from results kept in the tree.

    python -m experiments.pages                       # write every page anew
    python -m experiments.pages keep NAME FOLDER --command "..." [--commit C]

`docs/measured/NAME.csv` contains the figures of a finished folder, with its command and commit in
its first lines. A page has two kinds of places for them:

    <!-- measured: KIND NAME ... | COMMAND | COMMIT -->     a block, up to <!-- end -->
    69.2%<!--=NAME@SETTING-->                               a figure in a sentence

KIND is a key of `KINDS`, or "elsewhere" for a block that another program writes or wrote, without
kept results: its command and commit are in the mark only (for figures older than these marks, the
commit that added them). A setting may be followed by "@beyond" or "@all" (otherwise needles inside
the window), by "@COLUMN" of a table of one row a setting, or by the rank of a choice of heads among
all sets ("@n_above"); a setting with a * matches several, of which "@max", "@min" or "@mean" is
taken. A figure keeps its format: decimals, sign, per cent, interval or none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.pages.results import keep
from experiments.pages.writing import pages, written
from hooked_hybrid.outputs.folders import replacing


def main() -> None:
    """Store results, or write the pages anew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="do")
    keeping = commands.add_parser("keep", help="what pages need of a finished folder")
    keeping.add_argument("name")
    keeping.add_argument("folder", type=Path)
    keeping.add_argument("--command", required=True, help="that wrote the folder")
    keeping.add_argument("--commit", required=True, help="of the code it ran, + where changed")
    args = parser.parse_args()
    if args.do == "keep":
        print(keep(args.name, args.folder, args.command, args.commit))
        return
    for path in pages():
        old = path.read_text(encoding="utf-8")
        if (new := written(old)) != old:
            with replacing(path) as temporary:
                temporary.write_text(new, encoding="utf-8")
            print(f"{path}: written anew")


if __name__ == "__main__":
    main()
