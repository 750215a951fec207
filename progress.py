"""How far is a loop?"""

import sys

from tqdm import tqdm

EVERY = 30  # seconds between two lines of `progress`


class Lines(tqdm):
    """A progress bar whose states are lines, for logs."""

    @staticmethod
    def status_printer(file):
        def show(state):
            if state:
                print(state, file=file, flush=True)

        return show


def progress(items=None, desc="", total=None):
    """tqdm on a terminal; elsewhere a line on stderr every EVERY seconds says how far it is."""
    if not sys.stderr or sys.stderr.isatty():  # None where it is closed: 2>&-
        return tqdm(items, desc, total, leave=False, disable=not sys.stderr)
    return Lines(
        items,
        desc,
        total,
        leave=False,
        bar_format="{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left",
        delay=EVERY,
        mininterval=EVERY,
        miniters=1,
    )
