"""What lies between processes: shared memory and lifetimes."""
