"""Computations of single experiments, apart from what the experiment claims and reports: no file here is one itself."""
