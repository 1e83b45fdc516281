"""Run the command line with ``python -m sdwn``."""

from sdwn.cli.main import main

main()
