"""Processes: several under one, and one that starts again."""
