"""``python -m benchmarks.screen_quality``: how much of what could be pruned does the screen in 8 bits prune?

The screen may drop a key only where its bound proves that the key is not in the support, so it leaves more candidates
than there are survivors. An oracle would leave the survivors alone. The points lost are the difference, in percent of
the visible keys. The kernels do not tell their candidates: they are computed here, from the definitions in index.h and
indexed.h of csrc/cpu/threshold_attention.
"""

import argparse
import math
import random
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table

from benchmarks import attention_kinds as kinds
from benchmarks.attention_kinds import HEADS, THRESHOLD, WIDTH
from benchmarks.system import describe_run
from compsparse_kernels.cli.output import add_json_option, console_for, write_json
from compsparse_kernels.ops import cpu_isa

LENGTHS = (1024, 4096)
SHARES = (0.002, 0.01, 0.05, 0.15, 0.4)
QUERIES = 240  # of each head that are screened: whole blocks
ALLOWED = 5.0  # points that may be lost

# As in the sources: index_panel_keys, kBlockQueries, kSampledPanels, kMostCandidates, kLargestCode.
PANEL, BLOCK, SAMPLED_PANELS, MOST_CANDIDATES = 64, 24, 4, 0.5
LARGEST_CODE = 127
MOST_TOGETHER = 125.5  # of the sizes of a query's codes that meet in a sum of 16 bits, on AVX2
UNIT = 2.0**-24


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screen_quality", description=__doc__)
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    console = console_for(arguments.json)
    torch.manual_seed(random.randrange(2**31))
    cases = [(data, length, share) for data in ("Gaussian", "clustered") for length in LENGTHS for share in SHARES]
    rows = [describe(*case) for case in track(cases, "screening", console=console)]
    write_json({"machine": describe_run(), "allowed_points": ALLOWED, "rows": rows}, arguments.json)
    console.print(_table(rows))
    return 1 if any(row["survivors_lost"] for row in rows) else 0


def describe(data: str, length: int, share: float) -> dict:
    """Shares in percent: kept by the oracle, candidates of the screen; the points lost; and of the blocks of queries
    those that full precision takes over from the screen, because too many keys are candidates."""
    query, key, _ = kinds.tokens(length, data == "clustered", queries=min(QUERIES, length))
    query *= kinds.sharpness(query, key, share, kinds.above_threshold)
    survivors = kinds.above_threshold(query.double() @ key.double().mT * WIDTH**-0.5) >= 0
    screened = screen(query, key, WIDTH**-0.5, math.log(THRESHOLD))
    kept, candidates = (100 * float(chosen.double().mean()) for chosen in (survivors, screened.candidates))
    return {
        "data": data,
        "shape": f"B1 H{HEADS} T{length} D{WIDTH}",
        "kept": kept,
        "candidates": candidates,
        "points_lost": candidates - kept,
        "ok": candidates - kept <= ALLOWED,
        "survivors_lost": int((survivors & ~screened.candidates).sum()),
        "blocks_in_full_precision": 100 * float(_falls_back(screened).double().mean()),
    }


@dataclass(frozen=True)
class Codes:
    """Vectors ``[..., n, width]`` in 8 bits: codes times a scale, and what is known of each, ``[..., n]`` in double."""

    codes: torch.Tensor  # double, whole numbers of -127 .. 127
    scale: torch.Tensor
    size: torch.Tensor  # |x^|, the norm of what is stored
    error: torch.Tensor  # |x - x^|
    norm: torch.Tensor  # |x|


def encode(x: torch.Tensor, scale: torch.Tensor | None = None) -> Codes:
    """As ``encode`` of index.h, of finite float32 vectors; in units of ``scale``, or as a key is."""
    if scale is None:
        scale = x.abs().amax(-1) / LARGEST_CODE
    inverse = torch.where(scale > 0, 1 / scale, 0)
    codes = (x * inverse.unsqueeze(-1)).round().double()
    scale = scale.double()
    stored = codes * scale.unsqueeze(-1)
    return Codes(codes, scale, stored.norm(dim=-1), (x.double() - stored).norm(dim=-1), x.double().norm(dim=-1))


def query_step(query: torch.Tensor, isa: str | None) -> torch.Tensor:
    """As ``query_step`` of codes_avx2.h: on AVX2, products of four codes are added up in 16 bits."""
    if isa != "avx2":
        return query.abs().amax(-1) / LARGEST_CODE
    eights = F.pad(query.abs(), (0, -query.shape[-1] % 8)).unflatten(-1, (-1, 2, 2, 2))
    return eights.sum((-1, -3)).flatten(-2).amax(-1) / MOST_TOGETHER


@dataclass(frozen=True)
class Screened:
    candidates: torch.Tensor  # bool [..., queries, keys]
    sampled: torch.Tensor  # [..., queries]: the share of candidates in the panels that are looked at first


def screen(query: torch.Tensor, key: torch.Tensor, scale: float, cut: float, isa: str | None = None) -> Screened:
    """The keys that the screen of indexed.h can't exclude, for a support of all scores from the largest + ``cut`` on;
    by the kernels of an instruction set, or of those in use.

    A score less its error is certainly reached. The largest of these is the bound that keys are held against; at
    first that of some panels all over the keys, whose share of candidates tells whether the screen is worth it.
    """
    q, k = encode(query, query_step(query, isa or cpu_isa())), encode(key)
    scores = (q.codes @ k.codes.mT) * k.scale.unsqueeze(-2) * (scale * q.scale.unsqueeze(-1))
    per_size = q.error + 8 * UNIT * (q.norm + q.error)
    error = scale * (per_size.unsqueeze(-1) * k.size.unsqueeze(-2) + q.norm.unsqueeze(-1) * k.error.unsqueeze(-2))
    certain = scores - error
    sampled = _sampled_keys(key.shape[-2])
    reached = certain[..., sampled].amax(-1, keepdim=True)
    found = scores[..., sampled] >= reached + cut - error[..., sampled]
    # What an earlier panel leaves is held against the bound of the whole row at last.
    reached = reached.maximum(certain.amax(-1, keepdim=True))
    return Screened(scores >= reached + cut - error, found.double().mean(-1))


def _sampled_keys(keys: int) -> list[int]:
    """The keys of the panels that are looked at before all others."""
    panels = -(-keys // PANEL)
    samples = 1 if panels < 2 * SAMPLED_PANELS else SAMPLED_PANELS
    chosen = [(2 * number + 1) * panels // (2 * samples) for number in range(samples)]
    return [j for panel in chosen for j in range(panel * PANEL, min((panel + 1) * PANEL, keys))]


def _falls_back(screened: Screened) -> torch.Tensor:
    blocks = [block.mean(-1) for block in screened.sampled.split(BLOCK, -1)]
    return torch.stack(blocks, -1) > MOST_CANDIDATES


def _table(rows: list[dict]) -> Table:
    table = Table(title="What the screen in 8 bits leaves, in percent of the keys", title_justify="left")
    for heading in ("data", "shape", "kept", "candidates", "points lost", "survivors lost", "blocks in full precision"):
        table.add_column(heading, justify="left" if heading in ("data", "shape") else "right")
    for row in rows:
        lost = f"[{'green' if row['ok'] else 'red'}]{row['points_lost']:.2f}[/]"
        shares = (f"{row['kept']:.2f}", f"{row['candidates']:.2f}", lost, str(row["survivors_lost"]))
        table.add_row(row["data"], row["shape"], *shares, f"{row['blocks_in_full_precision']:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
