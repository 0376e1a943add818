"""The package's version: flit looks for it here, and whoever says it does."""

__version__ = "0.1.0"
