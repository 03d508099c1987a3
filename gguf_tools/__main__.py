"""python -m gguf_tools bundle|unbundle|verify|inspect ..."""

from gguf_tools.cli import main

if __name__ == "__main__":
    main()
