"""What `make reproduce` is made of: one module for each figure and table of the paper, measured on this machine."""
