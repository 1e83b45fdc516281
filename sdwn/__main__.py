"""Run the command line with ``python -m sdwn``."""

from sdwn.cli import main

main()
