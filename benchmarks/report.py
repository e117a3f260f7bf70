"""The rows as they come (a live table over a progress bar), and all of them at the end."""

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

LIVE_ROWS = 12


class Report:
    """Collects rows; as a context manager it shows the latest of them."""

    def __init__(self, console: Console, total: int):
        self.console = console
        self.rows: list[dict] = []
        self._progress = Progress(
            BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
        )
        self._task = self._progress.add_task("", total=total)
        self._live = Live(self._latest(), console=console, transient=True)

    def __enter__(self) -> "Report":
        self._live.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._live.__exit__(*exception)

    def begin(self, name: str) -> None:
        self._progress.update(self._task, description=name)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self._progress.advance(self._task)
        self._live.update(self._latest())

    def show_summary(self, interrupted: bool) -> None:
        groups: dict[str, list[dict]] = {}
        for row in self.rows:
            against = f" against {row['peer']}" if row["peer"] else ""
            groups.setdefault(f"{row['op']}, {row['direction']}{against}", []).append(row)
        for title, rows in groups.items():
            self.console.print(_table(title, rows, ("variant", "shape")))
        judged = [row for row in self.rows if row["ok"] is not None]
        errors = [row for row in self.rows if row["error"]]
        for row in errors:
            self.console.print(f"[red]error[/] {row['name']}, {row['threads']} threads: {row['error']}")
        reached = sum(row["ok"] for row in judged)
        ending = ", interrupted" if interrupted else ""
        self.console.print(
            f"{len(self.rows)} rows, {reached} of {len(judged)} bars reached, {len(errors)} errors{ending}"
        )

    def _latest(self) -> Group:
        return Group(_table("latest rows", self.rows[-LIVE_ROWS:], ("name",)), self._progress)


def _table(title: str, rows: list[dict], described_by: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in described_by:
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for heading in ("density", "thr", "ours ms", "peer ms", "ratio", "±", "bar"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        density = "" if row["density"] is None else f"{row['density']:.2g}"
        times = (_number(row["ours_ms"]), _number(row["peer_ms"]))
        described = (row[key] for key in described_by)
        table.add_row(*described, density, str(row["threads"]), *times, _ratio(row), _number(row["spread"]), _bar(row))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def _ratio(row: dict) -> str:
    if row["error"]:
        return "[red]error[/]"
    if row["ratio"] is None:
        return ""
    text = f"{row['ratio']:.2f}x"
    return text if row["ok"] is None else f"[green]{text}[/]" if row["ok"] else f"[red]{text}[/]"


def _bar(row: dict) -> str:
    if row["bar"] is not None:
        return f"{row['bar']:.3g}x"
    return "" if row["limit_ms"] is None else f"{row['limit_ms']:g} ms"
