"""Tools for GGUF files: write, inspect and measure models."""
