"""Prompts that were computed before: their state on flash, in blocks of tokens (docs/explanation/prompts.md)."""
