"""``python -m tests.rehearsal [WORD…]``: rehearses rows of budgets.md and prints them anew, with who waits and sends.

Those with all of the words, or the first table.
"""

from __future__ import annotations

import sys

from tests.rehearsal.budgets import Row, planned, records_of, rehearsals, runs, told
from tests.rehearsal.parts import PARTS

if __name__ == "__main__":
    words = sys.argv[1:]
    with rehearsals() as nursery:
        for run in runs():
            if all(word in run.what for word in words) and (words or not run.large):
                parts = [row.part for row in run.rows if row.part in PARTS]
                limits = planned(run.what)
                for part, record in records_of(run.what, parts, nursery).items():
                    print(Row.of(run.what, part, record, limits).line(), flush=True)
                    print(told(record), file=sys.stderr, flush=True)
