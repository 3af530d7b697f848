"""A task as an ordinary smaller model."""
