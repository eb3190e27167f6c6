"""Parts of bench/peers_cpu.py. Files named run_* and convert_* are scripts that run in a peer's own environment."""
