"""Guesses at the next tokens that one pass checks: docs/explanation/drafts.md."""
