"""`python -m bksdm`."""

from bksdm.cli import main

main()
