"""The command ``cogx-fast``: a module for each command.

Results go to stdout (with ``--json`` exactly one JSON object), everything else to stderr. Exit status: 0 done, 1
failed (the work, or the test whose result is the report's ``passed``), 2 asked for something that cannot be, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from cogx_fast.cli import bench, compare, demo, explain, export, generate, info, plan, quantize, recipes, roofline, tune
from cogx_fast.cli.arguments import Parser
from cogx_fast.cli.output import fail, one_line, quiet_libraries
from cogx_fast.extras import MissingDependencyError
from cogx_fast.terminal import Progress
from cogx_fast.version import __version__

_COMMANDS = {
    "demo": demo,
    "generate": generate,
    "compare": compare,
    "info": info,
    "explain": explain,
    "export": export,
    "plan": plan,
    "tune": tune,
    "quantize": quantize,
    "recipes": recipes,
    "roofline": roofline,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments, or None for the process's own.

    Returns:
        The exit status.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse's way out of --help and of what it cannot parse
        return int(stop.code or 0)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)  # for a command that starts itself again
    progress = Progress()
    try:
        with quiet_libraries(debug=arguments.debug):
            report, text = arguments.run(arguments, progress)
    except KeyboardInterrupt:
        progress.clear()
        return fail("interrupted", 130, debug=False)
    except (ValueError, OSError, MissingDependencyError) as error:
        progress.clear()
        return fail(one_line(error), 2, debug=arguments.debug)
    except Exception as error:  # noqa: BLE001  # whatever it is, the user gets a line and, asked for, the traceback
        progress.clear()
        hint = "" if arguments.debug else " (--debug shows where)"
        return fail(f"{type(error).__name__}: {one_line(error)}{hint}", 1, debug=arguments.debug)
    progress.clear()
    print(json.dumps(report, ensure_ascii=False) if arguments.json else text)
    return 1 if report.get("passed") is False else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cogx-fast", description="A fast CogVideoX video transformer for PyTorch.")
    parser.add_argument("--version", action="version", version=f"cogx-fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar=f"{{{','.join(_COMMANDS)}}}")
    for command in _COMMANDS.values():
        command.add(commands)
    return parser


__all__ = ["main"]
