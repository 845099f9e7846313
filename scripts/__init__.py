"""Tools, each run as `python -m scripts.NAME`."""

import sys

from util.preemption import stop_request

if sys.argv[0] == "-m":  # Python is about to run one, whose imports take seconds; nobody else imports this package so
    stop_request.install(importing=True)
