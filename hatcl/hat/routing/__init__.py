"""Which task an input belongs to, and what it is."""
