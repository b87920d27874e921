"""The registry of data sources, apart from the sources themselves so that they can import it."""

from fedjax_qp.registry import Registry

sources = Registry("data source", declares_examples=True)
"""Data sources, by name; each declares the kind of its examples."""
