"""Plans of runs, made without training: what a layout takes."""
