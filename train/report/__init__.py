"""What runs have learned, in figures: the command, what it counts, what it draws, and the page around it."""
