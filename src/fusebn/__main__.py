"""`python -m fusebn` is `fusebn`."""

from fusebn.cli import main

main()
