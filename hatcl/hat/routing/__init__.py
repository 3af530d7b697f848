"""Routing: predict the task of an input, and its class."""
