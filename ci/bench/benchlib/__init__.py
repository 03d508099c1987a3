"""What `make bench` and `make demo` share: runs of one model in one mode, each in a process of its own."""
