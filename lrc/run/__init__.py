"""How and where a command runs: devices, processes, offloading, seconds and peak memory."""
