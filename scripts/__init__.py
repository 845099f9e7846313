"""Tools, each run as `python -m scripts.NAME`."""

import sys

from util.preemption import stop_request

if sys.argv[0] == "-m":  # only while `python -m` starts a tool, whose imports take seconds
    stop_request.install(importing=True)
