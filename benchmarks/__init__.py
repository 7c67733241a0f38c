"""Speed, passes and memory of the fast forms beside the usual ways, in one run; `p0circuit bench` runs them."""
