"""What `make demo` is made of: a module for each of its parts, and one for what is seen of them."""
