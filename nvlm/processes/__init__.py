"""Worker processes, launchers, signals, process groups, and the device, CPU or CUDA."""
