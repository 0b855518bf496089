"""`python -m runvol`."""

from runvol.entry import main

main()
