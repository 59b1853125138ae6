"""``python -m kvpass``: the ``kvpass`` command."""

from kvpass.cli.main import main

main()
