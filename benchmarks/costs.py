"""The constants by which plans predict seconds, measured here, beside those that ship; stores nothing.

    python benchmarks/costs.py [--quick] [--json FILE]

`truemask bench --calibrate` measures the same and keeps it for this machine. Who changes a backend's speed runs this on
a quiet machine and writes the numbers into `src/truemask/backends/costs/rates.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from harness import Table, finish, options

from truemask.benchmarking.calibrate import LARGE_PROBE, SMALL_PROBE, measured_costs
from truemask.cli.commands.bench import beside_shipped


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure and show."""
    given = options(__doc__, arguments)
    large, seconds = (LARGE_PROBE._replace(n=64, heads=1), 0.01) if given.quick else (LARGE_PROBE, 2.0)
    found = measured_costs(lambda text: print(f"  {text}", file=sys.stderr), SMALL_PROBE, large, seconds)
    table = Table("Costs", ("backend", "constant", "shipped", "measured"))
    for row in beside_shipped(found):
        table.add(*row)
    table.numbers = [found]
    return finish([table], given)


if __name__ == "__main__":
    main()
