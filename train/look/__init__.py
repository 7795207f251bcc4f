"""Images, crops and labels of a set before training, and a network's results on them after: one HTML page."""
