"""``bench``: forwards to the benchmark suite, which lies in the repository and is not installed with the package."""

import argparse
import importlib
import importlib.util
import sys


def add_parser(subparsers) -> None:
    # No arguments of its own, not even --help: what the suite takes is written down once, there.
    parser = subparsers.add_parser("bench", help="speed of each op against its peers on this machine", add_help=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("benchmarks") is None:
        print(
            "the benchmarks are not installed with the package: clone the repository, and run this from its root"
            " (the folder that holds benchmarks/).",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module("benchmarks.run").main(arguments.forwarded)
