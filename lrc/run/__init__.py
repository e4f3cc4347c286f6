"""How and where a command runs: devices, processes, hidden states off the device, seconds and peaks."""
