"""The course: notebooks, the checkers of their exercises, and what they share."""
