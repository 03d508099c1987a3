"""A model divided among hosts: docs/explanation/workers.md."""
