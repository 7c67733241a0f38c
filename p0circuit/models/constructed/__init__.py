"""Models with a constructed P0 sink, so that the truth about it is known: weights, ground truth, building."""
