"""What a device and DRAM give: measured, kept, or assumed."""
