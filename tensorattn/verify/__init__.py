"""Verification: every theorem of the package, tried on random cases of a chosen type and device."""
