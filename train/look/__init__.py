"""Images, crops and labels of a set before training, and what a network makes of them after: one HTML page."""
