"""The command line: ``python -m compsparse_kernels info | check | bench | demo``.

Each subcommand is a module: ``add_parser(subparsers)`` describes it, ``run(arguments)`` does it and returns the exit
code. 0: well; 1: a check failed; 2: wrong arguments, or something it needs is not here; 130: stopped by Ctrl-C.
"""

import argparse
import sys

from compsparse_kernels._version import __version__
from compsparse_kernels.cli import bench, check, demo_command, info

SUBCOMMANDS = (info, check, bench, demo_command)
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compsparse_kernels",
        description="Sparse kernels for PyTorch: what this machine has, whether it computes right, how fast it is.",
        epilog="New here? Run  info , then  check , then  demo . Each has its own --help with examples.",
    )
    parser.add_argument("--version", action="version", version=f"compsparse_kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.command == "bench":
        arguments.forwarded = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
