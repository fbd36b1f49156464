"""``python -m tests.rehearsal [WORD…]``: rehearses rows of budgets.md and prints them anew, with who waits and sends.

Those with all of the words, or the first table.
"""

from __future__ import annotations

import sys

from tests.rehearsal.budgets import Row, record_of, rehearsals, rows, told

if __name__ == "__main__":
    with rehearsals() as nursery:
        for row in rows():
            if all(word in row.what for word in sys.argv[1:]) and (sys.argv[1:] or not row.large):
                record = record_of(row.what, nursery)
                print(Row.of(row.what, record).line(), flush=True)
                print(told(record), f"{sum(record.seconds):.1f} CPU s", sep="\n", file=sys.stderr, flush=True)
