"""The kinds of `ffengine analyze`; each `KIND(args)` computes everything and writes nothing."""
