"""A package of processors."""
