"""``python -m tests.campaign --minutes 5 --seed N``."""

from __future__ import annotations

import argparse
import random
import sys

from .runner import Campaign, Options


def main() -> int:
    """Run one campaign and print its figures; 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="a random one by default")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--pool", type=int, default=3, help="pool processes")
    parser.add_argument("--reload", action="store_true", help="also send SIGHUP to the supervisor")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    print(f"campaign: seed {seed}", flush=True)
    campaign = Campaign(
        Options(options.minutes * 60, seed, options.workers, options.pool, options.reload)
    )
    figures = campaign.run()
    print(figures.table())
    if figures.complaints:
        print(campaign.report(), file=sys.stderr)
    return 1 if figures.complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
