"""``python -m pyflowgen``."""

from pyflowgen.cli import main

main()
