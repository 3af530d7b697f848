"""Which models convert, proved model by model."""
