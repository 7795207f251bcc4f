"""What is typed first on a machine with a GPU: everything that needs one, stage by stage, on one page."""
