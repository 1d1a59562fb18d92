"""`python -m ffengine`: the same as the `ffengine` command."""

from ffengine.cli import main

raise SystemExit(main())
