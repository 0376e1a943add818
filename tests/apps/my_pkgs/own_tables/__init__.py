"""Apps whose tasks and workers are in tables of their own."""
