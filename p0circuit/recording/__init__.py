"""Recording: which quantities are measured inside a model, and how."""
