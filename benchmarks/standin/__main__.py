"""``python -m benchmarks.standin --card rtx4090 -- COMMAND``: run a command with a stand-in for a GPU."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.standin.build import StandinError, build, environment
from benchmarks.standin.cards import CARDS, get_card

OUT = Path(__file__).resolve().parents[2] / "out" / "standin"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.standin", description=__doc__)
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--devices", type=int, default=1, help="how many of it")
    parser.add_argument("--gib", type=float, help="memory of each, if other than the card's own")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command is given")
    card = get_card(options.card) if options.gib is None else get_card(options.card).with_memory(options.gib)
    try:
        folder = build(OUT)
    except StandinError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    os.execvpe(command[0], command, {**os.environ, **environment(folder, card, options.devices)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
