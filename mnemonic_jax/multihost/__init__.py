"""Many processes and devices: who is there, who writes, where arrays and files lie."""
