"""What a part of the demo hands over, and the two forms it is shown in: a rich table and one HTML file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from rich.table import Table

from compsparse_kernels.cli.demo.data import Digits
from compsparse_kernels.cli.demo.training import median_ms, speedup
from compsparse_kernels.cli.machine import describe_machine

COLUMNS = ("", "measure", "this library", "against", "verdict")


@dataclass(frozen=True)
class Row:
    """One comparison. ``worse`` marks what is worse than the peer, and is shown as such."""

    measure: str
    ours: str
    peer: str
    verdict: str
    worse: bool


@dataclass(frozen=True)
class Figure:
    caption: str
    png: bytes


@dataclass
class Section:
    """A part of the demo: what was asked (``text``), what came out."""

    key: str
    title: str
    text: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)


def accuracy_row(measure: str, ours: float, peer_name: str, peer: float) -> Row:
    points = round(100 * (ours - peer), 1)
    verdict = "equal" if points == 0 else f"{abs(points):.1f} points {'better' if points > 0 else 'worse'}"
    return Row(measure, f"{ours:.1%}", f"{peer_name} {peer:.1%}", verdict, points < 0)


def time_row(measure: str, ours: list[float], peer_name: str, peer: list[float]) -> Row:
    """From paired timings in seconds; the verdict is the median of the ratios of the pairs."""
    ratio = speedup(ours, peer)
    verdict = f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
    return Row(measure, f"{median_ms(ours):.2f} ms", f"{peer_name} {median_ms(peer):.2f} ms", verdict, ratio < 1)


def size_row(measure: str, ours: float, peer_name: str, peer: float, unit: str) -> Row:
    verdict = f"{peer / ours:.1f}x smaller" if ours <= peer else f"{ours / peer:.1f}x larger, worse"
    return Row(measure, f"{ours:,.2f} {unit}", f"{peer_name} {peer:,.2f} {unit}", verdict, ours > peer)


def machine(seed: int) -> dict:
    """Where the numbers come from."""
    here = describe_machine()
    return {
        "processor": here["processor"],
        "instruction set": here["instruction_set"] or "none (references in torch)",
        "cores": here["cores"],
        "threads": here["threads"],
        **{name: here["versions"][name] for name in ("torch", "python", "compsparse_kernels")},
        "seed": seed,
    }


def summary_table(sections: Sequence[Section]) -> Table:
    table = Table(title="Compositional sparsity on real handwritten digits", title_style="bold", header_style="bold")
    for name in COLUMNS:
        table.add_column(name)
    for section in sections:
        for number, row in enumerate(section.rows):
            verdict = f"[red]{row.verdict}[/]" if row.worse else f"[green]{row.verdict}[/]"
            table.add_row(f"({section.key})" if number == 0 else "", row.measure, row.ours, row.peer, verdict)
        table.add_section()
    return table


def write_html(path: Path, sections: Sequence[Section], environment: dict, digits: Digits, seconds: float) -> None:
    """One file that needs nothing else: the figures are inside."""
    facts = " · ".join(f"{escape(name)} <b>{escape(str(value))}</b>" for name, value in environment.items())
    train, test = len(digits.train_y), len(digits.test_y)
    error = 100 * (0.95 * 0.05 / test) ** 0.5  # binomial, in points
    body = "\n".join(_section_html(section) for section in sections)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>compsparse_kernels: demo</title><style>{_STYLE}</style></head><body><main>
<header><h1>Compositional sparsity on real digits</h1>
<p>Three ways in which a network can spend its arithmetic only on the edges that matter, run on {train + test}
handwritten digits of MNIST ({train} for training, {test} for the test), in {seconds:.0f} seconds on this machine:</p>
<p class="facts">{facts}</p></header>
<section><h2>All numbers</h2>{_rows_html([(s.key, row) for s in sections for row in s.rows])}
<p class="note">Times are medians over rounds in which both sides ran in turn; the verdict on a time is the median of
the rounds' ratios. On {test} test digits, one standard error of an accuracy near 95 % is {error:.1f} points. What is
worse than the peer is printed in red.</p></section>
{body}
</main></body></html>
""",
        encoding="utf-8",
    )


def _section_html(section: Section) -> str:
    text = "\n".join(f"<p>{paragraph}</p>" for paragraph in section.text)
    figures = "\n".join(
        f'<figure><img alt="{escape(figure.caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(figure.png).decode()}"><figcaption>{escape(figure.caption)}</figcaption></figure>'
        for figure in section.figures
    )
    title = f"<h2>({section.key}) {escape(section.title)}</h2>"
    rows = _rows_html([("", row) for row in section.rows])
    return f'<section id="{section.key}">{title}{text}{rows}{figures}</section>'


def _rows_html(rows: Sequence[tuple[str, Row]]) -> str:
    lines, last = [], None
    for key, row in rows:
        label = f"({key})" if key and key != last else ""
        last = key
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (row.measure, row.ours, row.peer))
        kind = "worse" if row.worse else "better"
        first = ' class="first"' if label else ""
        lines.append(f'<tr{first}><th>{label}</th>{cells}<td class="{kind}">{escape(row.verdict)}</td></tr>')
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


_STYLE = """
:root { --ink: #1d2330; --soft: #5c6577; --line: #dfe3ea; --worse: #b3261e; --better: #1b6e3c }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px }
section { padding: .6rem 1.6rem 1.4rem; margin-top: 1.6rem }
h1 { font-size: 1.9rem; margin: .4rem 0 }
h2 { font-size: 1.25rem }
p { max-width: 46rem }
.facts, .note, figcaption { color: var(--soft); font-size: .85rem }
.facts b { color: var(--ink); font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { text-align: left; padding: .32rem .7rem .32rem 0; border-top: 1px solid var(--line); vertical-align: top }
thead th { border-top: 0; color: var(--soft); font-weight: 600 }
tr.first > * { border-top: 2px solid #b8bfcc }
.worse { color: var(--worse); font-weight: 600 }
.better { color: var(--better) }
figure { margin: 1.4rem 0 0 }
img { max-width: 100%; display: block }
figcaption { margin-top: .4rem }
"""
