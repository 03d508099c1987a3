"""`python -m llama_flash` is the command `llama-flash`."""

from .cli import main

main()
