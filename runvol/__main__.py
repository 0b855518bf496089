"""`python -m runvol`."""

from runvol.cli import main

main()
