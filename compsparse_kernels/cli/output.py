"""Where a subcommand writes: tables for people, JSON for programs, never both into one stream."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

WIDTH_OF_FILES = 120


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=_writable,
        help="write the result as JSON to FILE too; - writes it to standard output, and the tables to standard error",
    )


def _writable(target: str) -> str:
    """Refuses what can't be written before the work is done, not after."""
    if target != "-":
        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(target).touch()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"expected a file that can be written, got {target}: {error}") from error
    return target


def console_for(json_target: str | None) -> Console:
    """Standard output, or standard error where standard output carries JSON; files and pipes get whole tables."""
    console = Console(stderr=json_target == "-")
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_OF_FILES)
    return console


def write_json(result: dict, json_target: str | None) -> None:
    if json_target is None:
        return
    text = json.dumps(result, indent=1) + "\n"
    if json_target == "-":
        sys.stdout.write(text)
    else:
        Path(json_target).write_text(text, encoding="utf-8")
