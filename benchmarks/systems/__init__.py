"""The systems that are measured, a file for each."""
