"""What the step sizes are doing: ``lightning_rprop.StepSizeMonitor``, and pictures, which need no torch."""
