"""Worker processes, launchers, signals, process groups, and the CPU as a device."""
