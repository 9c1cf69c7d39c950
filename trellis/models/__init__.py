"""The models of the system, one file each. `trellis.load_model` finds them by their official class names."""
