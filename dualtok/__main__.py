"""``python -m dualtok``, which launchers use."""

from dualtok.cli import main

main()
