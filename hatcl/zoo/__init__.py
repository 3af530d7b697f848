"""The models that convert, each proved by itself."""
