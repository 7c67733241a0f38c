"""From results to something to look at: this room knows results, not models."""
