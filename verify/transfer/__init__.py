"""Does the optimum stay? Sweeps of learning rate over widths and parametrizations, and what they say of transfer."""
