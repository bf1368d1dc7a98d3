"""Numbers about a run: collected without waiting for the device, written as JSON lines, a progress line, trackers."""
