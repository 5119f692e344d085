"""Verification: what operators claim and the theorems around it, tried on random cases of a chosen type and device."""
