"""The papers' tables: the command, which runs make each row, and how rows are written."""
