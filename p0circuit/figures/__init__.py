"""Figures, each drawn from the tables of a result."""
