"""The plugin's C interface in Python: the only room with ctypes."""
