"""MASE and CRPS of a network that was trained on synthetic series alone, beside the seasonal naive, on public series.

    .venv/bin/dualform forecast --pretrain any
    .venv/bin/python benchmarks/zero_shot.py any [--only co2,nile] [--auto]

The series, horizons and origins are those of benchmarks/forecasting.py; --auto adds what `auto` does, which is
fitted to each series. The network sees none of them before.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from forecasting import series

from dualform.forecast import Forecaster, SeasonalNaive, evaluate
from dualform.forecast.families import deep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a folder of --pretrain")
    parser.add_argument("--only", default="", help="names, with commas")
    parser.add_argument("--origins", type=int, default=3)
    parser.add_argument("--auto", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = series()
    heads = ["network", *(["auto"] if asked.auto else []), "seasonal naive"]
    print(f"| series | steps | {' | '.join(f'MASE of {head}' for head in heads)} | CRPS, relative | 95 % | seconds |")
    print("|---|---|" + "---|" * (len(heads) + 3))
    rows = []
    for name in asked.only.split(",") if asked.only else known:
        load, season = known[name]
        y, horizon = load(), 12 if season > 1 else 6
        room = (len(y) - horizon - 2 * season) // (horizon // 2) + 1
        origins = max(1, min(asked.origins, room))
        start = time.perf_counter()
        ours = evaluate(
            Forecaster(partial(deep, weights=asked.weights), season=season, horizon=horizon),
            y,
            horizon,
            origins=origins,
        )
        seconds = time.perf_counter() - start
        found = [ours]
        if asked.auto:
            found.append(evaluate(Forecaster(season=season, horizon=horizon), y, horizon, origins=origins))
        found.append(evaluate(SeasonalNaive(season), y, horizon, origins=origins))
        relative = ours.crps.item() / found[-1].crps.item()
        rows.append([*(one.mase.item() for one in found), relative])
        shown = " | ".join(f"{score:.3f}" for score in rows[-1])
        print(f"| {name} | {len(y)} | {shown} | {ours.coverage[0, 2]:.0%} | {seconds:.1f} |", flush=True)
    print(f"| mean of {len(rows)} | | {' | '.join(f'{score:.3f}' for score in np.mean(rows, 0))} | | |")


if __name__ == "__main__":
    main()
