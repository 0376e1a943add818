"""What is run as a command must not be imported with the rest."""

raise SystemExit("__main__ was imported")
