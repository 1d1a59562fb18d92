"""What the commands of the command line do; each `run_NAME(args)` gives (text, JSON value)."""
